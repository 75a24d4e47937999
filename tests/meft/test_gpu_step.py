"""Steps of rows in host memory by the device; the device here is the CPU, and its stream a thread with delays."""

import logging
from contextlib import nullcontext
from functools import partial

import pytest
import torch

import meft.table.gpu_step
from meft import RowAdamW
from meft.table.gpu_step import ZeroCopySteps
from meft.table.moments import Moments
from meft.table.row_step import StepRule, update_rows
from meft.transport.transfer import Traffic
from tests.support.thread_streams import ThreadStreams, on_streams
from tests.support.tiny_meft import STRATEGIES

RULE = StepRule(1e-2, 0.9, 0.99, 1e-8, 0.1, True)


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    """So that a step takes several rounds of both buffers."""
    monkeypatch.setattr(meft.table.gpu_step, "CAPACITY", 5)


def trained(tiny, zero_copy, steps=3, clip=None, optimizer=None, **fields):
    rule = {"zero_copy": zero_copy} | fields.pop("row_optimizer", {})
    sizes = {"master_dtype": "float32", "retrieval": "stream"}
    model = tiny.adapted(layers=3, dtype=torch.bfloat16, row_optimizer=rule, **(sizes | fields))
    streams = on_streams(model, longest=1e-3)
    optimizer = optimizer(model) if optimizer is not None else tiny.adamw(model, lr=2e-2)
    for step in range(steps):
        for micro in range(2):
            tiny.loss(model, 2 * step + micro).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(tiny.trainable(model), clip)
        optimizer.step()
        optimizer.zero_grad()
    return model, streams


def row_adamw(model):
    return RowAdamW(model.parameters(), lr=2e-2)


VARIANTS = {
    "masters in bfloat16": {"master_dtype": "bfloat16"},
    "compute copy in float16": {"row_dtype": "float16"},
    "no narrower copy": {"row_dtype": "float32"},
    "clipping": {"clip": 0.05},
    "RowAdamW": {"optimizer": row_adamw},
} | {strategy: {"retrieval": strategy} for strategy in STRATEGIES}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_result_is_that_of_the_host_to_the_bit(tiny, variant):
    """Of the host's C++ too, where the variant takes it."""
    by_host, streams = trained(tiny, False, **VARIANTS[variant])
    assert streams.numbers["updating"] == 0
    by_device, streams = trained(tiny, True, **VARIANTS[variant])
    assert streams.numbers["updating"] > 3 * 6  # more than one round of each table
    tiny.assert_equal(tiny.whole_state(by_device), tiny.whole_state(by_host))


def test_with_updates_in_the_backward_pass(tiny):
    states = []
    for zero_copy in (False, True):
        rule = {"in_backward": True, "zero_copy": zero_copy}
        model = tiny.adapted(layers=3, dtype=torch.bfloat16, master_dtype="float32", row_optimizer=rule)
        streams = on_streams(model, longest=1e-3)
        optimizer = tiny.adamw(model, lr=2e-2)
        for step in range(4):
            tiny.loss(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append(tiny.whole_state(model))
        assert (streams.numbers["updating"] > 0) == zero_copy
    tiny.assert_equal(*states)


def step_of(streams, traffic=None, seed=0, n=13, r=20, d=6, dtype=torch.float32):
    """One step of a new table by the device; the table, its moments and what a host's step gives."""
    chance = torch.Generator().manual_seed(seed)
    master, gradient = torch.randn(r, d, generator=chance), torch.randn(n, d, generator=chance).to(dtype)
    rows = torch.randperm(r, generator=chance)[:n].sort().values
    steps = ZeroCopySteps(streams, d)
    found = []
    for by_device in (False, True):
        table, compute_copy = master.clone(), master.to(torch.bfloat16)
        state = Moments.fresh(table).row_state(table, compute_copy)
        step = partial(steps, traffic or Traffic()) if by_device else update_rows
        step(state, rows, gradient, RULE, seed=0)
        found.append(state)
    assert all(torch.equal(a, b) for a, b in zip(*(state.tensors() for state in found), strict=True))
    return steps


@pytest.mark.parametrize("n", [0, 1, 5, 6, 10, 11, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_rows(n, dtype):
    traffic = Traffic()
    step_of(ThreadStreams(longest=1e-3), traffic, n=n, dtype=dtype)
    # Up: gradient in float32, master, both moments, count, id; down: master, both moments, count, compute copy.
    assert traffic.bytes_zero_copy == n * (6 * (4 * 4 + 3 * 4 + 2) + 3 * 4)


def test_a_model_that_was_made_float64_steps_on_the_host(tiny):
    states = []
    for zero_copy in (False, True):
        model, streams = trained(tiny, zero_copy, steps=1)
        model.double()
        before = streams.numbers["updating"]
        optimizer = tiny.adamw(model)
        tiny.loss(model).backward()
        optimizer.step()
        states.append(tiny.whole_state(model))
        assert streams.numbers["updating"] == before
    tiny.assert_equal(*states)


def test_what_was_queued_before_a_failure_is_waited_for():
    streams, waited = ThreadStreams(), []

    class StreamEvent:
        def wait(self):
            waited.append(1)

    class CopyStream:
        def wait_event(self, event): ...

        def run(self, work, uses=()):
            raise ZeroDivisionError

        def record_event(self):
            return StreamEvent()

    streams.updating = CopyStream()
    with pytest.raises(ZeroDivisionError):
        step_of(streams)
    assert waited == [1]


def test_both_buffers_are_waited_for_when_a_step_fails(tiny):
    model, streams = trained(tiny, True, steps=1)
    for table in tiny.tables(model):
        table.synchronize()
    streams.failing = {("updating", streams.numbers["updating"] + 1)}
    optimizer = tiny.adamw(model)
    tiny.loss(model).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"keys of layer 0 failed: copy .* of the updating stream"):
        tiny.tables(model)[0].synchronize()
    (steps,) = {table.step.func for table in tiny.tables(model)}
    for table in tiny.tables(model):
        table.synchronize()  # the others, which came after it
    assert all(buffer._free is None for buffer in steps._buffers)
    before = tiny.whole_state(model)
    optimizer.zero_grad()
    tiny.loss(model).backward()
    optimizer.step()
    after = tiny.whole_state(model)
    assert any(not torch.equal(after[name], before[name]) for name in before if "keys" in name)


@pytest.mark.parametrize("refusal", ["pages", "probe", "other device"])
def test_where_the_device_cannot_reach_the_memory_the_host_steps(monkeypatch, caplog, refusal):
    streams = ThreadStreams()
    steps, held = ZeroCopySteps(streams, 6), []
    steps._device = torch.device("mps" if refusal == "other device" else "cuda")
    monkeypatch.setattr(meft.table.gpu_step.dispatch, "device_guard", lambda device: nullcontext())
    monkeypatch.setattr(
        meft.table.gpu_step.PageLock, "hold", lambda self, t, device: held.append(t) or refusal != "pages"
    )
    monkeypatch.setattr(meft.table.gpu_step, "zero_copy", lambda device, **tensors: refusal != "probe")
    monkeypatch.setattr(meft.table.gpu_step, "ZeroCopySteps", lambda streams, d: steps)
    monkeypatch.setitem(step_of.__globals__, "ZeroCopySteps", lambda streams, d: steps)
    with caplog.at_level(logging.WARNING):
        step_of(streams)
        step_of(streams, seed=1)
    assert steps.refused
    assert streams.numbers["updating"] == 0
    assert [record.message for record in caplog.records if "zero_copy" in record.message] == [
        "MEFT: the device cannot step rows in host memory (zero_copy): the host does."
    ]
    assert len(held) == {"pages": 1, "probe": 5, "other device": 0}[refusal]  # table, two moments, count, compute copy


def test_the_memory_is_locked_once(monkeypatch):
    steps, held = ZeroCopySteps(ThreadStreams(), 6), []
    steps._device = torch.device("cuda")
    table = torch.zeros(2, 6)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: any(self is t for t in held))
    monkeypatch.setattr(meft.table.gpu_step.PageLock, "hold", lambda self, t, device: held.append(t) or True)
    monkeypatch.setattr(meft.table.gpu_step, "zero_copy", lambda device, **tensors: True)
    state = Moments.fresh(table).row_state(table)
    assert steps._reaches(state)
    assert steps._reaches(state)
    assert len(held) == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"row_optimizer": {"zero_copy": 1}}, "zero_copy=1 must be True or False"),
        ({"row_optimizer": {"zero_copy": True}, "master_dtype": "float64"}, "needs master_dtype='float32' or 'bfl"),
        ({"row_optimizer": {"zero_copy": True}, "pin_memory": False}, "needs rows in page-locked host memory"),
        ({"row_optimizer": {"zero_copy": True}, "placement": "device"}, "needs rows in page-locked host memory"),
    ],
)
def test_what_it_cannot_go_with_is_refused(tiny, fields, message):
    with pytest.raises(ValueError, match=message):
        tiny.config(**({"master_dtype": "float32"} | fields))
