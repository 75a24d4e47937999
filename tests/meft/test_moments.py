"""Moments of rows in an optimizer's state: the rule against a plain oracle, and the ways of saving and restoring."""

import copy
import io
import pickle
import sys
import threading

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from meft import RowAdamW
from meft.table.moments import KEY, Moments, RowMoments
from meft.table.row_step import StepRule, update_rows
from meft.table.update_queue import UpdateQueue
from tests.support.processes import run_code

R, D = 9, 4

rules = st.builds(
    StepRule,
    lr=st.floats(1e-4, 1e-1),
    beta1=st.sampled_from([0.0, 0.5, 0.9]),
    beta2=st.sampled_from([0.5, 0.999]),
    eps=st.sampled_from([1e-8, 1e-3]),
    weight_decay=st.sampled_from([0.0, 0.3]),
    decoupled=st.booleans(),
)
touches = st.sets(st.integers(0, R - 1)).map(sorted)
runs = st.lists(st.tuples(rules, touches), min_size=1, max_size=10)


def table(dtype=torch.float64):
    return torch.randn(R, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def grads(rows, step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    return torch.tensor(rows, dtype=torch.int64), torch.randn(len(rows), D, generator=generator).to(dtype)


def oracle(p, steps):
    """Row by row; yields the state after each step."""
    p, m, v, n = p.double().clone(), torch.zeros(R, D).double(), torch.zeros(R, D).double(), [0] * R
    for step, (rule, rows) in enumerate(steps, 1):
        for row, g in zip(rows, grads(rows, step)[1], strict=True):
            n[row] += 1
            if rule.decoupled:
                p[row] *= 1 - rule.lr * rule.weight_decay
            else:
                g = g + rule.weight_decay * p[row]
            m[row] = rule.beta1 * m[row] + (1 - rule.beta1) * g
            v[row] = rule.beta2 * v[row] + (1 - rule.beta2) * g * g
            root = (v[row] / (1 - rule.beta2 ** n[row])).sqrt()
            p[row] -= rule.lr * m[row] / (1 - rule.beta1 ** n[row]) / (root + rule.eps)
        yield p, m, v, n


@settings(deadline=None, max_examples=30)
@given(runs)
def test_steps_equal_the_plain_rule(steps):
    p = table()
    own = Moments.fresh(p)
    state = own.row_state(p)
    for step, ((rule, rows), expected) in enumerate(zip(steps, oracle(p, steps), strict=True), 1):
        before = [t.clone() for t in state.tensors()]
        update_rows(state, *grads(rows, step), rule)
        untouched = [i for i in range(R) if i not in rows]
        for old, new in zip(before, state.tensors(), strict=True):
            assert torch.equal(old[untouched], new[untouched])
        for ours, theirs in zip((p, own.exp_avg, own.exp_avg_sq), expected, strict=False):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
        assert own.counts.tolist() == expected[3]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_fresh_moments_are_zero_and_wide(dtype, expected):
    own = Moments.fresh(table(dtype))
    assert own.exp_avg.dtype == own.exp_avg_sq.dtype == expected
    assert own.counts.dtype == torch.int32
    assert not any(t.any() for t in own.tensors().values())


def test_moments_follow_a_table_to_a_device():
    own = Moments.fresh(table())
    assert own.to(torch.device("cpu")) is own
    assert {t.device.type for t in own.to(torch.device("meta")).tensors().values()} == {"meta"}


# ---------------------------------------------------------------------- memory is shared until it is written


def test_copies_share_memory_until_one_is_updated():
    entry = RowMoments(Moments.fresh(table()))
    first, second = copy.deepcopy(entry), copy.copy(entry)
    assert first.moments is second.moments is entry.moments
    kept = entry.moments
    own = entry.exclusive(torch.device("cpu"))
    assert own is entry.moments
    assert own is not kept  # the copies keep what they had
    assert first.moments is kept
    assert entry.exclusive(torch.device("cpu")) is own  # once
    del second
    assert first.exclusive(torch.device("cpu")) is kept  # nobody else has it any more


def test_a_deepcopy_names_an_entry_once():
    entry = RowMoments(Moments.fresh(table()))
    a, b = copy.deepcopy([entry, entry])
    assert a is b


# ---------------------------------------------------------------------- every way of saving and restoring

FIELDS = {"lr": 1e-2, "weight_decay": 0.1}
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, foreach=False, **FIELDS),
    "adamw foreach": lambda p: torch.optim.AdamW(p, foreach=True, **FIELDS),
    "adamw fused": lambda p: torch.optim.AdamW(p, fused=True, **FIELDS),
    "adam": lambda p: torch.optim.Adam(p, **FIELDS),
    "bitsandbytes": lambda p: pytest.importorskip("bitsandbytes").optim.AdamW8bit(p, **FIELDS),
    "RowAdamW": lambda p: RowAdamW(p, **FIELDS),
}


def through_file(state, **kwargs):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, **kwargs)


WAYS = {
    "deepcopy": copy.deepcopy,
    "torch.load": through_file,  # weights_only, torch's default
    "torch.load, all": lambda state: through_file(state, weights_only=False),
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
}


@pytest.mark.parametrize(
    ("master", "name", "way"),
    [
        *((master, name, "torch.load") for master in ("float32", "bfloat16") for name in OPTIMIZERS),
        *(("bfloat16", "adamw", way) for way in WAYS if way != "torch.load"),
        ("float32", "bitsandbytes", "deepcopy"),
    ],
)
def test_a_restored_optimizer_continues_bit_for_bit(tiny, master, name, way):
    def start():
        model = tiny.adapted(dtype=torch.float32, master_dtype=master)
        return model, OPTIMIZERS[name](tiny.trainable(model))

    whole, optimizer = start()
    tiny.train(whole, 2, optimizer)
    saved = WAYS[way]((whole.state_dict(), optimizer.state_dict()))
    tiny.train(whole, 2, optimizer, first=2)
    for _ in range(2):  # what was saved stays what it was
        model, again = start()
        model.load_state_dict(saved[0])
        again.load_state_dict(saved[1])  # has never stepped
        saved_again = WAYS[way](again.state_dict())
        again.load_state_dict(saved_again)
        tiny.train(model, 2, again, first=2)
        tiny.assert_equal(tiny.whole_state(model), tiny.whole_state(whole))


def test_a_rewind_in_one_process(tiny):
    model = tiny.adapted(dtype=torch.float32)
    optimizer = tiny.train(model, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    ends = []
    for _ in range(3):
        tiny.train(model, 2, optimizer, first=2)
        ends.append(tiny.whole_state(model))
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(copy.deepcopy(saved[1]))  # torch's optimizers go on in the memory they are given
    tiny.assert_equal(ends[1], ends[0])
    tiny.assert_equal(ends[2], ends[0])


def test_several_optimizers_keep_their_own_moments(tiny):
    """Keys in one, values in another; and two that step the same rows in turn, as torch's AdamW would."""
    whole = tiny.adapted(dtype=torch.float32)
    rows = [t.rows for t in tiny.tables(whole)]
    both = [torch.optim.AdamW(rows[0::2], **FIELDS), torch.optim.AdamW(rows[1::2], **FIELDS)]
    single = tiny.adapted(dtype=torch.float32)
    one = torch.optim.AdamW([t.rows for t in tiny.tables(single)], **FIELDS)
    for step in range(3):
        for model, optimizers in ((whole, both), (single, [one])):
            model.zero_grad()
            tiny.loss(model, step).backward()
            for optimizer in optimizers:
                optimizer.step()
    tiny.assert_equal(tiny.whole_state(whole), tiny.whole_state(single))
    first, second = both[0], torch.optim.AdamW(rows[0::2], **FIELDS)
    for step, optimizer in enumerate((first, second, first)):
        whole.zero_grad()
        tiny.loss(whole, step).backward()
        optimizer.step()
    assert first.state[rows[0]]["step"] == 5
    assert second.state[rows[0]]["step"] == 1
    assert first.state[rows[0]][KEY].moments.counts.sum() > second.state[rows[0]][KEY].moments.counts.sum()


@pytest.mark.parametrize("prepared", [False, True], ids=["", "prepared warm"])
def test_accelerate_saves_and_loads(tiny, tmp_path, prepared):
    ends = []
    for load in (False, True):
        accelerator, model = Accelerator(cpu=True), tiny.adapted(dtype=torch.float32)
        optimizer = torch.optim.AdamW(tiny.trainable(model), **FIELDS)
        if prepared and not load:
            tiny.train(model, 1, optimizer, first=7)
        model, optimizer = accelerator.prepare(model, optimizer)
        if load:
            accelerator.load_state(tmp_path)
        else:
            tiny.train(model, 2, optimizer)
            accelerator.save_state(tmp_path)
        tiny.train(model, 2, optimizer, first=2)
        ends.append(tiny.whole_state(accelerator.unwrap_model(model)))
    tiny.assert_equal(*ends)


class FakeDevice:
    """A device that counts the bytes that torch.load brings to it."""

    def __init__(self):
        self.bytes = 0
        self.inside = True
        torch.serialization.register_package(-1, lambda storage: None, self.bring)

    def bring(self, storage, location):
        if location == "fake:0":
            self.bytes += storage.nbytes()
            return storage
        return None


fake = FakeDevice()


@pytest.mark.parametrize("weights_only", [True, False])
def test_no_table_lands_on_the_device_of_map_location(tiny, weights_only):
    model = tiny.adapted(dtype=torch.float32)
    optimizer = tiny.train(model, 1)
    state = {"before": torch.zeros(100), "optimizer": optimizer.state_dict(), "after": torch.zeros(50)}
    routers = sum(
        v.nbytes for s in optimizer.state.values() if KEY not in s for v in s.values() if isinstance(v, torch.Tensor)
    )
    fake.bytes = 0
    loaded = through_file(state, map_location="fake:0", weights_only=weights_only)
    assert fake.bytes == 600 + routers + 4 * len(tiny.tables(model))  # and the entries' numbers of steps
    again = tiny.adapted(dtype=torch.float32)
    restored = tiny.adamw(again)
    restored.load_state_dict(loaded["optimizer"])
    for ours, theirs in zip(tiny.tables(again), tiny.tables(model), strict=True):
        own, expected = (o.state[t.rows][KEY].moments for o, t in ((restored, ours), (optimizer, theirs)))
        for a, b in zip(own.tensors().values(), expected.tensors().values(), strict=True):
            assert torch.equal(a, b)


def test_a_file_that_ends_between_the_marks_leaves_nothing_behind(tiny):
    model = tiny.adapted(dtype=torch.float32)
    entry = tiny.train(model, 1).state[tiny.tables(model)[0].rows][KEY]

    class Torn:
        def __reduce__(self):
            function, arguments = entry.__reduce__()
            return function, arguments[:-1]  # one is missing: the call fails after the first mark

    with pytest.raises(TypeError):
        through_file(Torn(), map_location="fake:0", weights_only=False)
    fake.bytes = 0
    through_file(torch.zeros(10), map_location="fake:0")
    assert fake.bytes == 40


@pytest.mark.parametrize("stepped", [False, True], ids=["first step", "later"])
def test_an_adapter_that_was_set_aside_after_its_backward_pass_is_stepped_by_rows(tiny, stepped):
    model = tiny.adapted(dtype=torch.float32)
    tables = tiny.tables(model)
    optimizer = tiny.train(model, 1) if stepped else tiny.adamw(model)
    optimizer.zero_grad()
    tiny.loss(model, rows=1, length=2).backward()
    touched = [table.rows.grad.rows.clone() for table in tables]
    before = [table.rows.detach().clone() for table in tables]
    model.add_adapter("other", tiny.config())
    model.set_adapter("other")
    optimizer.step()
    for table, rows, values in zip(tables, touched, before, strict=True):
        assert torch.equal((table.rows != values).any(1).nonzero().flatten(), rows)
        assert optimizer.state[table.rows].keys() == {"step", KEY}


def test_an_optimizer_outlives_an_adapter_whose_gradients_it_had(tiny):
    model = tiny.adapted(dtype=torch.float32)
    optimizer = tiny.train(model, 1)  # its gradients are still there
    model.add_adapter("other", tiny.config())
    model.delete_adapter("default")
    optimizer.step()


def test_a_state_of_another_adapter_is_refused(tiny):
    model, other = tiny.adapted(dtype=torch.float32), tiny.adapted(dtype=torch.float32, r=24)
    saved = tiny.train(model, 1).state_dict()
    optimizer = tiny.adamw(other)
    optimizer.load_state_dict(saved)
    before = tiny.state(other)
    tiny.loss(other).backward()
    with pytest.raises(ValueError, match=r"The state of AdamW: exp_avg .*\[48, 32\] where .*\[24, 32\].*adapter's r"):
        optimizer.step()
    tiny.assert_equal(tiny.state(other), before)


def test_lost_moments_are_told_once(tiny):
    model = tiny.adapted(dtype=torch.float32)
    optimizer = tiny.train(model, 1)
    saved = optimizer.state_dict()
    saved["state"] = {i: s for i, s in saved["state"].items() if KEY not in s}
    again = tiny.adamw(model)
    again.load_state_dict(saved)
    with pytest.warns(UserWarning, match="no moments of MEFT's rows: they restart") as caught:
        tiny.train(model, 2, again)
    assert len([w for w in caught if "they restart" in str(w.message)]) == 1


def test_a_state_of_0_1s_row_adamw(tiny):
    """It had the tensors themselves in its state, and a clock."""
    model, other = (tiny.adapted(dtype=torch.float32) for _ in range(2))
    optimizer = RowAdamW(tiny.trainable(model), **FIELDS)
    tiny.train(model, 2, optimizer)
    saved = optimizer.state_dict()
    old = {i: s[KEY].moments.tensors() | {"clock": torch.tensor([0, 2, 0])} for i, s in saved["state"].items()}
    other.load_state_dict(model.state_dict())
    again = RowAdamW(tiny.trainable(other), **FIELDS)
    again.load_state_dict({**saved, "state": copy.deepcopy(old), "mode": "lazy"})
    for m, o in ((model, optimizer), (other, again)):
        tiny.train(m, 2, o, first=2)
    tiny.assert_equal(tiny.whole_state(other), tiny.whole_state(model))
    for held in old.values():
        held["clock"][0] = 1
    with pytest.raises(ValueError, match=r"aslora-meft 0\.1 with mode='dense'"):
        again.load_state_dict({**saved, "state": old})


# ---------------------------------------------------------------------- gradients after a step


@pytest.mark.parametrize("make", [torch.optim.AdamW, RowAdamW])
def test_gradients_can_be_looked_at_until_zero_grad(tiny, make):
    model = tiny.adapted(dtype=torch.float32)
    optimizer = make(tiny.trainable(model), **FIELDS)
    tiny.loss(model).backward()
    torch.nn.utils.clip_grad_norm_(tiny.trainable(model), 1e-3)
    before = tiny.gradients(model)
    optimizer.step()
    tiny.assert_equal(tiny.gradients(model), before)  # as they were clipped
    optimizer.zero_grad()
    assert all(table.rows.grad is None for table in tiny.tables(model))


@pytest.mark.parametrize(
    "write", [lambda g: g.mul_(100), lambda g: g.add_(g.clone()), lambda g: torch._foreach_mul_([g], 100.0)]
)
def test_what_is_written_into_a_gradient_after_a_step_is_too_late(tiny, write):
    """Also where the update is queued, and has not run yet."""
    ends = []
    for late in (False, True):
        model = tiny.adapted(dtype=torch.float32)
        tables, gate = tiny.tables(model), threading.Event()
        queue = UpdateQueue()
        for table in tables:
            table.updates = queue
        optimizer = tiny.adamw(model)
        tiny.loss(model).backward()
        queue.add(gate.wait, "nothing")
        if not late:
            gate.set()
        optimizer.step()
        if late:
            for table in tables:
                write(table.rows.grad)
        gate.set()
        ends.append(tiny.whole_state(model))
    tiny.assert_equal(*ends)


# ---------------------------------------------------------------------- memory

PEAK = """
import os, sys, threading, time
import torch
from meft.table.moments import Moments, RowMoments
from meft.table.row_table import RowTable
from meft.files import training_state as state

def resident():  # bytes of this process that no file backs
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) * 1024

table = RowTable((4096, 8192), master=torch.float32, compute_dtype=torch.float32, on_host=True, pin=False)  # 128 MiB
table.fill(0.02)
optimizer = torch.optim.AdamW([table.rows])
moments = table.moments_in(optimizer).moments
for tensor in moments.tensors().values():
    tensor.fill_(1)

def measure(work):
    base, peak, stop = resident(), [0], threading.Event()

    def watch():
        while not stop.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    work()
    stop.set()
    thread.join()
    print((peak[0] - base) / 2**20)

def load():
    again = torch.optim.AdamW([table.rows])
    again.load_state_dict(torch.load(sys.argv[1] + "/optimizer.pt"))
    table.moments_in(again).exclusive(torch.device("cpu"))

measure(lambda: torch.save(optimizer.state_dict(), sys.argv[1] + "/optimizer.pt"))
measure(lambda: state.save({"rows": table}, sys.argv[1] + "/state"))
del moments, tensor
optimizer.state.clear()
table._stepped_with = None
measure(load)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is read from /proc")
def test_saving_and_loading_take_no_second_copy(tmp_path):
    *saving, loading = map(float, run_code(PEAK, tmp_path).split()[-3:])
    assert max(saving) < 64  # MiB above the tables, of which each has 128
    assert loading < 256 + 64  # the moments themselves
