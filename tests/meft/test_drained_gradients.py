"""Gradients that were drained: what is known of them, factors that wait for the update, memory that is used again."""

import copy
import io
import math
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import meft.gradient.host.drain
import meft.gradient.host.pool
import meft.gradient.stored_rows
import meft.table.row_step
from adapter_kernels.adamw.moment_layout import MODES
from meft.gradient.host.drain import drain, squares, total
from meft.gradient.host.pool import GradientPool
from meft.gradient.offload_ring import GradientRing
from meft.gradient.row_gradient import RowGradient
from meft.table.gpu_step import ZeroCopySteps
from meft.table.moments import Moments
from meft.table.row_step import RowState, StepRule, native_library, update_rows
from meft.transport.streams import HostStreams
from meft.transport.transfer import Traffic
from tests.support.thread_streams import ThreadStreams

R, D = 40, 24
ROWS = torch.arange(1, R, 3)
NEEDS_LIBRARY = pytest.mark.skipif(native_library() is None, reason="the C++ library was not built at installation")
PATHS = [pytest.param(True, id="c++", marks=NEEDS_LIBRARY), pytest.param(False, id="torch")]
RULE = StepRule(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, decoupled=True)
COUPLED = StepRule(lr=1e-2, beta1=0.2, beta2=0.99, eps=1e-6, weight_decay=0.1, decoupled=False)


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """With the library, and where there was no compiler."""
    if not request.param:
        for module in (meft.gradient.host.drain, meft.table.row_step):
            monkeypatch.setattr(module, "native_library", lambda: None)
    return request.param


@pytest.fixture
def ring():
    return GradientRing(HostStreams(torch.device("cpu")), 8, D, torch.bfloat16)  # two slots a gradient


def randn(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameter():
    return nn.Parameter(torch.zeros(R, D))


def sent(ring, table, seed=0, rows=ROWS, values=None):
    """A gradient on its way, and its values in float64."""
    values = randn(len(rows), D, seed=seed) if values is None else values
    return ring.send(rows, values, table, Traffic()), values.double()


# ---------------------------------------------------------------------- the pass


ODD = [math.inf, -math.inf, math.nan, 3.3e38, 1e-40, 0.0, -0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.float64])
@settings(max_examples=25)
@given(
    n=st.integers(0, 9), d=st.integers(1, 70), seed=st.integers(0, 99), odd=st.lists(st.sampled_from(ODD), max_size=2)
)
def test_the_pass_widens_and_adds_up_squares(dtype, n, d, seed, odd):
    for native in {native_library(), None}:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(meft.gradient.host.drain, "native_library", lambda native=native: native)
            values = randn(n, d, seed=seed, dtype=torch.float32).mul_(10.0 ** (seed % 30 - 15)).to(dtype)
            for i, value in enumerate(odd if n else ()):
                values.view(-1)[(7 * i + seed) % values.numel()] = value
            target = torch.full((n, d), 7.0)
            found, exact = total(drain(values, target)), values.double().square().sum().item()
            torch.testing.assert_close(target, values.float(), rtol=0, atol=0, equal_nan=True)
            assert found == squares(target) or math.isnan(found)
            if dtype != torch.float64:  # else the values are rounded on their way
                assert found == pytest.approx(exact, rel=1e-12, nan_ok=True)
            assert math.isfinite(found) == bool(target.isfinite().all())


@NEEDS_LIBRARY
def test_the_number_of_threads_changes_no_bit_of_the_sum(monkeypatch):
    values, found = randn(301, 1100), set()
    for threads in (1, 2, 7):
        monkeypatch.setenv("ASLORA_MEFT_THREADS", str(threads))
        found.add(total(drain(values, torch.empty(301, 1100))))
    with ThreadPoolExecutor(4) as pool:  # at the same time, beside updates
        found |= set(pool.map(lambda _: total(drain(values, torch.empty(301, 1100))), range(16)))
    assert len(found) == 1


def test_masters_in_float64_are_looked_at():
    table = nn.Parameter(torch.zeros(R, D, dtype=torch.float64))
    gradient, exact = sent(GradientRing(HostStreams(torch.device("cpu")), 8, D, torch.bfloat16), table)
    assert gradient.squares() is None
    assert float(gradient.norm()) == pytest.approx(float(exact.norm()), rel=1e-14)


# ---------------------------------------------------------------------- what is known, and who ends it


def writes_by_array(g):
    g.row_values.numpy()[0] = 5.0


def second(g):
    g.add_(RowGradient(ROWS, torch.ones(len(ROWS), D), torch.zeros(R, D)))


WRITES = {
    "an element": lambda g: g.row_values.__setitem__((0, 0), math.inf),
    "a view of the values": lambda g: g.row_values[2:4].mul_(3.0),
    "values that were detached": lambda g: g.row_values.detach().view(-1)[3:9].fill_(4.0),
    ".data": lambda g: g.row_values.data.mul_(2.0),
    ".data of a view": lambda g: g.row_values[1].data.zero_(),
    "an array": writes_by_array,
    "dlpack": lambda g: torch.from_dlpack(g.row_values).mul_(2.0),
    "a storage": lambda g: torch.empty(0).set_(g.row_values.untyped_storage()).fill_(1.5),
    "neg_ and mul_": lambda g: g.neg_().mul_(math.inf),
    "mul_ by rows": lambda g: g.mul_(torch.arange(R)[:, None]),
    "mul_ by nan": lambda g: g.mul_(math.nan),
    "div_": lambda g: g.div_(3.0),
    "clamp_": lambda g: g.clamp_(-0.1, 0.1),
    "an alias's clamp_": lambda g: g.detach().clamp_(-0.1, 0.1),
    ".data of the gradient": lambda g: g.data.clamp_(-0.1, 0.1),
    "masked_fill_": lambda g: g.masked_fill_(g > 0, 0.0),
    "an item": lambda g: g.__setitem__((int(ROWS[0]), 0), 9.0),
    "add_": second,
    "add_ of itself": lambda g: g.add_(g.clone()),
    "_foreach_clamp_max_": lambda g: torch._foreach_clamp_max_([g], 0.01),
    "_foreach_neg_": lambda g: torch._foreach_neg_([g]),
    "out=": lambda g: torch.mul(g, 2.0, out=g),
    "copy_": lambda g: g.copy_(g.to_dense() * 2),
    "zero_": lambda g: g.zero_(),
}


@pytest.mark.parametrize("known_first", [False, True], ids=["", "after a norm"])
@pytest.mark.parametrize("name", WRITES)
def test_whoever_writes_into_it_is_noticed(ring, name, known_first):
    table = parameter()
    table.grad, _ = sent(ring, table)
    if known_first:
        table.grad.norm()
        table.grad.mul_(0.5)
    WRITES[name](table.grad)
    exact = table.grad.to_dense().double().norm()
    for norm in (table.grad.norm(), torch._foreach_norm([table.grad])[0], torch.linalg.vector_norm(table.grad)):
        torch.testing.assert_close(norm.double(), exact, rtol=1e-5, atol=0, equal_nan=True)
    found_inf, scale = torch.zeros(()), torch.ones(())
    torch._amp_foreach_non_finite_check_and_unscale_([table.grad], found_inf, scale)
    assert bool(found_inf) == (not exact.isfinite())


def test_the_norm_needs_no_look(ring, path, monkeypatch):
    table = parameter()
    table.grad, exact = sent(ring, table)
    assert table.grad.squares() == pytest.approx(float(exact.square().sum()), rel=1e-14)
    monkeypatch.setattr(meft.gradient.stored_rows, "multiplied", None)
    monkeypatch.setattr(RowGradient, "stored", None)
    norm = nn.utils.clip_grad_norm_([table], 0.5)
    assert norm.dtype == torch.float32
    assert float(norm) == float(exact.norm().float())
    assert float(nn.utils.get_total_norm([table.grad])) == pytest.approx(0.5, rel=1e-5)


# ---------------------------------------------------------------------- factors


FACTORS = {
    "1": [1.0],
    "a number": [0.3],
    "a tensor": [torch.tensor(0.3)],
    "a tensor in float64": [torch.tensor(0.3, dtype=torch.float64)],
    "two": [2.0**-16, 0.3],
    "1 between": [0.3, 1.0, torch.tensor(0.7)],
    "four": [0.3, 0.7, 1.1, -0.9],
    "zero": [0.0],
    "zero, then more": [0.0, 2.0],
    "too small for float32": [1e-30, 1e-30],
    "tiny": [1e-42],
    "too large for float32": [1e30, 1e30],
    "huge": [1e300],
    "inf": [math.inf],
    "nan": [torch.tensor(math.nan)],
}


@pytest.mark.parametrize(
    "multiply", [lambda g, f: g.mul_(f), lambda g, f: torch._foreach_mul_([g], f)], ids=["", "all"]
)
@pytest.mark.parametrize("name", FACTORS)
def test_whoever_reads_finds_it_multiplied(ring, name, multiply):
    table = parameter()
    table.grad, values = sent(ring, table)
    plain = values.float()
    for factor in FACTORS[name]:
        multiply(table.grad, factor)
        multiply(plain, factor)
        norm = table.grad.norm().double()
        torch.testing.assert_close(norm, plain.double().norm(), rtol=1e-5, atol=1e-28, equal_nan=True)
    for look in (table.grad.clone(), table.grad.detach(), table.grad.row_values, table.grad * 1.0, table.grad):
        found = look.to_dense()[ROWS] if isinstance(look, RowGradient) else look
        torch.testing.assert_close(found, plain, rtol=0, atol=0, equal_nan=True)


def test_one_value_of_another_dtype_multiplies_as_it_does_a_plain_tensor(ring):
    table, factor = parameter(), torch.tensor([0.3], dtype=torch.float64)
    table.grad, values = sent(ring, table)
    assert torch.equal(table.grad.mul_(factor).row_values, values.float().mul_(factor))


def test_who_holds_the_values_sees_them_multiplied(ring):
    table = parameter()
    for hold in (lambda g: g.row_values, lambda g: g.row_values.numpy(), lambda g: g.detach(), lambda g: g.stored()[1]):
        table.grad, values = sent(ring, table)
        held = hold(table.grad)
        nn.utils.clip_grad_norm_([table], 0.1)
        found = held.row_values if isinstance(held, RowGradient) else torch.as_tensor(held)
        assert torch.equal(found, table.grad.row_values)
        assert not torch.equal(found, values.float())


def through_a_file(gradient):
    file = io.BytesIO()
    torch.save(gradient, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, through_a_file])
def test_copies_are_multiplied_and_stay_what_they_are(ring, copied):
    table = parameter()
    table.grad, values = sent(ring, table)
    table.grad.mul_(0.3)
    made = copied(table.grad)
    assert torch.equal(made.row_values, values.float() * 0.3)
    assert torch.equal(table.grad.row_values, values.float() * 0.3)
    if copied is not copy.copy:
        table.grad.neg_()
        assert torch.equal(made.row_values, values.float() * 0.3)


def test_a_micro_batch_that_comes_later_is_not_multiplied(ring):
    table = parameter()
    table.grad, first = sent(ring, table)
    table.grad.mul_(0.25)
    other, more = sent(ring, table, seed=1)
    table.grad.add_(other)
    assert torch.equal(table.grad.row_values, (first * 0.25 + more).float())
    assert float(table.grad.norm()) == pytest.approx(float((first * 0.25 + more).norm()), rel=1e-6)


def test_unscaling_and_clipping_need_no_look(ring, path, monkeypatch):
    table = parameter()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(torch.ones(()))
    optimizer = torch.optim.SGD([table], lr=0.1)
    table.grad, values = sent(ring, table)
    stored = RowGradient.stored
    monkeypatch.setattr(RowGradient, "stored", None)
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_([table], 1e-6)
    monkeypatch.setattr(RowGradient, "stored", stored)
    assert not any(bool(v) for v in scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values())
    assert float(norm) == pytest.approx(float(values.norm()) * 2.0**-16, rel=1e-6)
    factor = (1e-6 / (norm + 1e-6)).clamp(max=1.0)
    assert torch.equal(table.grad.row_values, values.float().mul(2.0**-16).mul(factor))


def state_of(dtype):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(R, D, generator=generator).to(dtype)
    copy = torch.zeros(R, D, dtype=torch.bfloat16) if dtype == torch.float32 else None
    return RowState(table, torch.zeros(R, D), torch.zeros(R, D), torch.zeros(R, dtype=torch.int32), copy)


@pytest.mark.parametrize("factors", [(), (0.3,), (2.0**-16, 0.3), (1e-38, 1e-5), (-0.7, 0.0)], ids=str)
@pytest.mark.parametrize("rule", [RULE, COUPLED], ids=["AdamW", "Adam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", [*PATHS, "by the device"])
def test_the_update_multiplies_as_torch_does(way, dtype, rule, factors, monkeypatch):
    monkeypatch.setattr(meft.table.row_step, "_BLOCK", 3 * D)
    factors = tuple(float(torch.tensor(f, dtype=torch.float32)) for f in factors)
    gradient, found = randn(len(ROWS), D, dtype=torch.float32), []
    for given_factors in (factors, ()):
        state = state_of(dtype)
        for scale in (1.0, -3.0):
            grads = gradient * scale
            for factor in () if given_factors else factors:
                grads = grads * factor
            if way == "by the device":
                streams = ThreadStreams()
                ZeroCopySteps(streams, D)(Traffic(), state, ROWS, grads, rule, seed=3, factors=given_factors)
                streams.close()
            else:
                native = way if dtype == torch.float32 else None
                update_rows(state, ROWS, grads, rule, seed=3, factors=given_factors, native=native)
        found.append([x for x in state if x is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("fields", [{}, {"row_optimizer": {"zero_copy": True}}, {"master_dtype": "bfloat16"}], ids=str)
def test_clipped_training_equals_that_with_gradients_that_are_multiplied(tiny, path, monkeypatch, fields):
    found = []
    for later in (True, False):
        if not later:
            monkeypatch.setattr(RowGradient, "multiply_later", lambda self, factor: False)
        model = tiny.adapted(2, dtype=torch.bfloat16, retrieval="stream", **fields)
        streams = ThreadStreams()
        model.base_model.engines["default"].use(streams)
        optimizer = tiny.adamw(model)
        for step in range(3):
            for micro in range(1 + step % 2):
                tiny.loss(model, 2 * step + micro).backward()
            nn.utils.clip_grad_norm_(tiny.trainable(model), 0.01)
            optimizer.step()
            optimizer.zero_grad()
        found.append(tiny.whole_state(model))
        streams.close()
    tiny.assert_equal(*found)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", [RULE, COUPLED], ids=["AdamW", "Adam"])
def test_an_update_reads_bfloat16_as_the_same_values_in_float32(path, rule, master, mode):
    found, width = [], 300  # of float8 a block and a part of one
    for dtype in (torch.bfloat16, torch.float32):
        table = randn(R, width, seed=3).to(master)
        copy = None if master == torch.bfloat16 else table.to(torch.bfloat16)
        state = Moments.fresh(table, mode).row_state(table, copy)
        for seed in (1, 2):
            grads = randn(len(ROWS), width, seed=seed).to(dtype)
            update_rows(state, ROWS, grads, rule, seed=3, factors=(0.3, -0.7), native=path)
        found.append(state.tensors())
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "fields",
    [{}, {"row_optimizer": {"moments": "rowwise", "in_backward": True}}, {"master_dtype": "bfloat16"}],
    ids=str,
)
def test_training_with_gradients_as_they_came_equals_that_with_float32(tiny, path, monkeypatch, fields):
    """Also those that are read, changed and added up."""
    found, kept = [], set()
    in_backward = fields.get("row_optimizer", {}).get("in_backward", False)
    for wide in (False, True):
        if wide:
            monkeypatch.setattr(GradientRing, "_kept_in", lambda self, table: torch.float32)
        model = tiny.adapted(2, dtype=torch.bfloat16, retrieval="stream", **fields)
        optimizer = tiny.adamw(model)
        for step in range(4):
            for micro in range(1 if in_backward else 1 + step // 3):
                tiny.loss(model, 2 * step + micro).backward()
            gradients = [table.rows.grad for table in tiny.tables(model) if table.rows.grad is not None]
            if not in_backward:
                kept |= {gradient.to_multiply()[1].dtype for gradient in gradients if step < 3 and not wide}
                if step == 1:
                    gradients[0].row_values.mul_(3)
                    gradients[1].neg_()
                nn.utils.clip_grad_norm_(tiny.trainable(model), 0.01)
            optimizer.step()
            optimizer.zero_grad()
        found.append(tiny.whole_state(model))
    tiny.assert_equal(*found)
    assert kept == (set() if in_backward else {torch.bfloat16})


def test_values_are_widened_once_they_are_looked_at(ring):
    table = parameter()
    table.grad, values = sent(ring, table)
    came, queued = table.grad.to_multiply()[1], table.grad.for_update()
    assert came.dtype == torch.bfloat16
    assert table.grad.squares() == squares(values.float())
    assert table.grad.row_values.dtype == torch.float32
    table.grad.row_values.zero_()
    assert table.grad.squares() in (None, 0.0)
    assert torch.equal(queued.to_multiply()[1], came)  # the update that was queued before
    assert torch.equal(came.double(), values)


@pytest.mark.parametrize("passes", [1, 2])
def test_a_look_in_inference_mode_leaves_values_that_can_be_changed(ring, passes):
    """As of a callback that logs the gradients."""
    table, exact = parameter(), torch.zeros(R, D, dtype=torch.float64)
    for seed in range(passes):  # other rows in each
        gradient, values = sent(ring, table, seed, ROWS + seed)
        table.grad = gradient if table.grad is None else table.grad.add_(gradient)
        exact[ROWS + seed] = values
    norm = float(exact.norm())
    with torch.inference_mode():
        assert float(table.grad.norm()) == pytest.approx(norm)
        assert float(table.grad.abs().max()) > 0
    table.grad.row_values.mul_(2)
    assert float(table.grad.norm()) == pytest.approx(2 * norm)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_values_that_are_looked_at_in_each_step_take_memory_once(ring, factor):
    table = parameter()
    for step in range(4):
        ring.begin_pass()
        table.grad, values = sent(ring, table, step)
        table.grad.norm()
        table.grad.mul_(factor)
        assert torch.equal(table.grad.row_values.double(), values * factor)
        assert ring._pool.nbytes == len(ROWS) * D * (2 + 4)
        dropped(table)


def test_zeroing_does_not_look_at_the_values(ring, monkeypatch):
    table = parameter()
    table.grad, _ = sent(ring, table)
    assert len(table.grad.rows) == len(ROWS)  # once they have landed
    monkeypatch.setattr(meft.gradient.stored_rows, "multiplied", None)
    table.grad.zero_()
    assert table.grad.to_multiply()[1].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_autograd_takes_over_is_not_written_under_an_update(dtype):
    """With `in_backward`: the gradient is queued first, and then copied into `.grad`."""
    ring = GradientRing(HostStreams(torch.device("cpu")), 8, D, dtype)
    table = parameter()
    gradient, values = sent(ring, table, values=randn(len(ROWS), D, dtype=dtype))
    queued = gradient.for_update()
    table.grad = RowGradient(ROWS[:0], torch.zeros(0, D), table)
    table.grad.copy_(gradient)
    del gradient
    table.grad.row_values.zero_()
    assert torch.equal(queued.to_multiply()[1].double(), values)


def test_runs_that_accumulate_get_float32_at_once(ring):
    table, found = parameter(), []
    for step in range(3):
        for micro in range(2):
            gradient, _ = sent(ring, table, 2 * step + micro)
            found.append(gradient.to_multiply()[1].dtype)
            table.grad = gradient if table.grad is None else table.grad.add_(gradient)
        dropped(table)
    assert found == [torch.bfloat16] + [torch.float32] * 5


# ---------------------------------------------------------------------- memory


def zeroed(table):
    torch.optim.SGD([table]).zero_grad(set_to_none=False)


def dropped(table):
    torch.optim.SGD([table]).zero_grad()


@pytest.mark.parametrize("reset", [zeroed, dropped])
def test_memory_comes_back_at_zero_grad(ring, reset):
    table, found = parameter(), set()
    for step in range(4):
        gradient, values = sent(ring, table, step)
        if table.grad is None:
            table.grad = gradient
        else:
            table.grad.add_(gradient)
        del gradient
        found.add(table.grad.to_multiply()[1].untyped_storage().data_ptr())
        assert torch.equal(table.grad.row_values, values.float())
        reset(table)
    assert len(found) == 1


KEPT = {
    "the gradient": lambda g: (g, lambda g: g.row_values),
    "an alias": lambda g: (g.detach(), lambda g: g.row_values),
    "its values": lambda g: (g.row_values, lambda v: v),
    "a row": lambda g: (g.row_values[2], lambda v: v),
    "an array": lambda g: (g.row_values.numpy(), torch.as_tensor),
    "dlpack": lambda g: (torch.from_dlpack(g.row_values), lambda v: v),
    "a storage": lambda g: (g.row_values.untyped_storage(), lambda s: torch.empty(0).set_(s)),
    "an update that is queued": lambda g: (g.for_update(), lambda g: g.to_multiply()[1]),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_somebody_keeps_never_changes(ring, name):
    table = parameter()
    table.grad, _ = sent(ring, table)
    kept, look = KEPT[name](table.grad)
    before = look(kept).clone()
    for step in range(1, 5):
        dropped(table)
        table.grad, values = sent(ring, table, step)
        assert torch.equal(table.grad.row_values, values.float())
        table.grad.mul_(0.5)
    assert torch.equal(look(kept), before)


def test_what_a_hook_keeps_does_not_change(tiny):
    model = tiny.adapted(1, dtype=torch.bfloat16, retrieval="stream")
    model.base_model.engines["default"].use(HostStreams(torch.device("cpu")))
    rows, kept = tiny.tables(model)[0].rows, []
    rows.register_hook(kept.append)
    tiny.loss(model).backward()
    before = kept[0].to_dense()
    nn.utils.clip_grad_norm_([rows], 1e-3)
    assert not torch.equal(rows.grad.to_dense(), before)
    rows.grad.clamp_(-1e-6, 1e-6)
    assert torch.equal(kept[0].to_dense(), before)


def test_the_pool_takes_no_more_than_gradients_took_at_a_time():
    pool, largest = GradientPool(D), 0
    random = torch.Generator().manual_seed(0)
    for step in range(30):
        pool.begin_pass()
        sizes = torch.randint(1, 1000 if step < 20 else 50, (8,), generator=random).tolist()
        held = [pool.take(rows, torch.float32) for rows in sizes]
        assert all(len(values) == rows for values, rows in zip(held, sizes, strict=True))
        assert len({values.untyped_storage().data_ptr() for values in held}) == 8
        largest = max(largest, sum(sizes))
        assert pool.nbytes <= 8 * 1000 * 1.125 * D * 4
        if step >= 25:
            assert pool.nbytes <= 2 * 8 * 60 * D * 4  # what a smaller step does not need was given back
        del held
    for _ in range(4):
        pool.begin_pass()
    assert pool.nbytes == 0


def test_equal_steps_take_the_same_memory():
    pool, found = GradientPool(D), []
    for _ in range(3):
        pool.begin_pass()
        held = [pool.take(rows, torch.float32) for rows in (100, 200, 300, 200)]
        found.append({values.untyped_storage().data_ptr() for values in held})
        del held
    assert found[0] == found[1] == found[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_process_that_reads_it_gets_a_sentence(ring):
    table = parameter()
    table.grad, _ = sent(ring, table)
    values = table.grad.row_values
    child = os.fork()
    if child == 0:
        told = 0
        for read in (lambda: table.grad.rows, lambda: table.grad.norm(), lambda: values[0]):
            try:
                read()
            except RuntimeError as error:
                told += "forked" in str(error)
        os._exit(told)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


def copied(gradient):
    """As autograd's copy into `.grad`: values that are on their way are taken over."""
    made = gradient.new_empty_strided(gradient.shape, gradient.stride())
    return made.copy_(gradient)


@torch.no_grad()
@pytest.mark.parametrize("write", ["clip", "add", "values"])
def test_copies_of_a_copy_do_not_change(ring, write):
    table = parameter()
    gradient, _ = sent(ring, table)
    kept, later = copied(gradient), copied(gradient)
    expected = sent(ring, table)[0].row_values.clone()
    del gradient
    if write == "clip":
        torch._foreach_mul_([later], torch.tensor(0.25))
    elif write == "add":
        later += sent(ring, table, seed=1)[0]
    else:
        later.row_values.mul_(2)
    assert not torch.equal(later.row_values, expected)
    assert torch.equal(kept.row_values, expected)


@torch.no_grad()
def test_memory_that_other_processes_have_is_not_given_out_again(ring):
    values = sent(ring, parameter())[0].row_values.detach().as_subclass(torch.Tensor).share_memory_()
    there = values.untyped_storage().data_ptr()
    del values  # another process may read on
    again = [sent(ring, parameter(), seed=seed)[0] for seed in range(1, 4)]
    assert there not in [gradient.stored()[1].untyped_storage().data_ptr() for gradient in again]


def test_a_gradient_on_its_way_can_be_saved(ring):
    gradient, expected = sent(ring, parameter())
    file = io.BytesIO()
    torch.save([gradient], file)
    file.seek(0)
    (loaded,) = torch.load(file, weights_only=False)
    assert torch.equal(loaded.row_values.double(), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_equal_steps_take_no_more_memory_however_they_are_checkpointed(tiny, monkeypatch, reentrant):
    """Reentrant checkpointing goes backward through each layer by itself."""
    model = tiny.adapted(6, dtype=torch.float32, retrieval="stream")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.base_model.engines["default"].use(HostStreams(torch.device("cpu")))
    taken, keep = [], meft.gradient.host.pool.keep_from_forks
    monkeypatch.setattr(
        meft.gradient.host.pool, "keep_from_forks", lambda buffer: (taken.append(buffer), keep(buffer))[1]
    )
    optimizer, after = torch.optim.SGD(model.parameters(), lr=0.0), []
    for _ in range(4):
        optimizer.zero_grad()
        tiny.loss(model.train()).backward()
        after.append(len(taken))
    assert after[0] > 0
    assert after[1] == after[2] == after[3]
