"""Steps of rows in host memory by the device; the device here is the CPU, and its lane a thread with delays."""

import logging
from contextlib import nullcontext

import pytest
import torch
from test_engine import STRATEGIES, on_lanes
from thread_lanes import ThreadLanes

import meft.zero_copy
from meft import RowAdamW
from meft.moments import Moments
from meft.row_update import StepRule
from meft.transfer import Traffic
from meft.zero_copy import ZeroCopySteps

RULE = StepRule(1e-2, 0.9, 0.99, 1e-8, 0.1, True)


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    """So that a step takes several rounds of both buffers."""
    monkeypatch.setattr(meft.zero_copy, "CAPACITY", 5)


def trained(tiny, zero_copy, steps=3, clip=None, optimizer=None, **fields):
    rule = {"zero_copy": zero_copy} | fields.pop("row_optimizer", {})
    sizes = {"master_dtype": "float32", "retrieval": "stream"}
    model = tiny.adapted(layers=3, dtype=torch.bfloat16, row_optimizer=rule, **(sizes | fields))
    lanes = on_lanes(model, longest=1e-3)
    optimizer = optimizer(model) if optimizer is not None else tiny.adamw(model, lr=2e-2)
    for step in range(steps):
        for micro in range(2):
            tiny.loss(model, 2 * step + micro).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(tiny.trainable(model), clip)
        optimizer.step()
        optimizer.zero_grad()
    return model, lanes


def row_adamw(model):
    return RowAdamW(model.parameters(), lr=2e-2)


VARIANTS = {
    "masters in bfloat16": {"master_dtype": "bfloat16"},
    "wire in float16": {"row_dtype": "float16"},
    "no narrower copy": {"row_dtype": "float32"},
    "clipping": {"clip": 0.05},
    "RowAdamW": {"optimizer": row_adamw},
} | {strategy: {"retrieval": strategy} for strategy in STRATEGIES}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_result_is_that_of_the_host_to_the_bit(tiny, variant):
    """Of the host's C++ too, where the variant takes it."""
    by_host, lanes = trained(tiny, False, **VARIANTS[variant])
    assert lanes.numbers["updating"] == 0
    by_device, lanes = trained(tiny, True, **VARIANTS[variant])
    assert lanes.numbers["updating"] > 3 * 6  # more than one round of each table
    tiny.assert_equal(tiny.whole_state(by_device), tiny.whole_state(by_host))


def test_with_updates_in_the_backward_pass(tiny):
    states = []
    for zero_copy in (False, True):
        rule = {"in_backward": True, "zero_copy": zero_copy}
        model = tiny.adapted(layers=3, dtype=torch.bfloat16, master_dtype="float32", row_optimizer=rule)
        lanes = on_lanes(model, longest=1e-3)
        optimizer = tiny.adamw(model, lr=2e-2)
        for step in range(4):
            tiny.loss(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append(tiny.whole_state(model))
        assert (lanes.numbers["updating"] > 0) == zero_copy
    tiny.assert_equal(*states)


def step_of(lanes, traffic=None, seed=0, n=13, r=20, d=6):
    """One step of a new table by the device; the table, its moments and what a host's step gives."""
    chance = torch.Generator().manual_seed(seed)
    master, gradient = torch.randn(r, d, generator=chance), torch.randn(n, d, generator=chance)
    rows = torch.randperm(r, generator=chance)[:n].sort().values
    steps = ZeroCopySteps(lanes, d)
    found = []
    for by_device in (False, True):
        table, wire = master.clone(), master.to(torch.bfloat16)
        moments = Moments.fresh(table)
        by = [lambda *a, **k: steps(traffic or Traffic(), *a, **k)] if by_device else []
        moments.update(table, wire, rows, gradient, RULE, 0, *by)
        found.append([table, wire, moments.exp_avg, moments.exp_avg_sq, moments.counts])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    return steps


@pytest.mark.parametrize("n", [0, 1, 5, 6, 10, 11, 20])
def test_any_number_of_rows(n):
    traffic = Traffic()
    step_of(ThreadLanes(longest=1e-3), traffic, n=n)
    # Up: gradient, master, both moments, count, id; down: master, both moments, count, wire.
    assert traffic.bytes_zero_copy == n * (6 * (4 * 4 + 3 * 4 + 2) + 3 * 4)


def test_a_model_that_was_made_float64_steps_on_the_host(tiny):
    states = []
    for zero_copy in (False, True):
        model, lanes = trained(tiny, zero_copy, steps=1)
        model.double()
        before = lanes.numbers["updating"]
        optimizer = tiny.adamw(model)
        tiny.loss(model).backward()
        optimizer.step()
        states.append(tiny.whole_state(model))
        assert lanes.numbers["updating"] == before
    tiny.assert_equal(*states)


def test_what_was_queued_before_a_failure_is_waited_for():
    lanes, waited = ThreadLanes(), []

    class Mark:
        def wait(self):
            waited.append(1)

    class Lane:
        def after(self, mark): ...

        def run(self, work, uses=()):
            raise ZeroDivisionError

        def mark(self):
            return Mark()

    lanes.updating = Lane()
    with pytest.raises(ZeroDivisionError):
        step_of(lanes)
    assert waited == [1]


def test_both_buffers_are_waited_for_when_a_step_fails(tiny):
    model, lanes = trained(tiny, True, steps=1)
    for table in tiny.tables(model):
        table.settle()
    lanes.failing = {("updating", lanes.numbers["updating"] + 1)}
    optimizer = tiny.adamw(model)
    tiny.loss(model).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"keys of layer 0 failed: copy .* of the updating lane"):
        tiny.tables(model)[0].settle()
    (steps,) = {table.step.func for table in tiny.tables(model)}
    for table in tiny.tables(model):
        table.settle()  # the others, which came after it
    assert all(buffer._free is None for buffer in steps._buffers)
    before = tiny.whole_state(model)
    optimizer.zero_grad()
    tiny.loss(model).backward()
    optimizer.step()
    after = tiny.whole_state(model)
    assert any(not torch.equal(after[name], before[name]) for name in before if "keys" in name)


@pytest.mark.parametrize("refusal", ["pages", "probe", "other device"])
def test_where_the_device_cannot_reach_the_memory_the_host_steps(monkeypatch, caplog, refusal):
    lanes = ThreadLanes()
    steps, held = ZeroCopySteps(lanes, 6), []
    steps._device = torch.device("mps" if refusal == "other device" else "cuda")
    monkeypatch.setattr(meft.zero_copy.dispatch, "on", lambda device: nullcontext())
    monkeypatch.setattr(meft.zero_copy.PageLock, "hold", lambda self, t, device: held.append(t) or refusal != "pages")
    monkeypatch.setattr(meft.zero_copy, "zero_copy", lambda device, **tensors: refusal != "probe")
    monkeypatch.setattr(meft.zero_copy, "ZeroCopySteps", lambda lanes, d: steps)
    monkeypatch.setitem(step_of.__globals__, "ZeroCopySteps", lambda lanes, d: steps)
    with caplog.at_level(logging.WARNING):
        step_of(lanes)
        step_of(lanes, seed=1)
    assert steps.refused
    assert lanes.numbers["updating"] == 0
    assert [record.message for record in caplog.records if "zero_copy" in record.message] == [
        "MEFT: the device cannot step rows in host memory (zero_copy): the host does."
    ]
    assert len(held) == {"pages": 1, "probe": 5, "other device": 0}[refusal]  # table, two moments, count, wire


def test_the_memory_is_locked_once(monkeypatch):
    steps, held = ZeroCopySteps(ThreadLanes(), 6), []
    steps._device = torch.device("cuda")
    table = torch.zeros(2, 6)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: any(self is t for t in held))
    monkeypatch.setattr(meft.zero_copy.PageLock, "hold", lambda self, t, device: held.append(t) or True)
    monkeypatch.setattr(meft.zero_copy, "zero_copy", lambda device, **tensors: True)
    assert steps._reaches({"table": table})
    assert steps._reaches({"table": table})
    assert len(held) == 1


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
