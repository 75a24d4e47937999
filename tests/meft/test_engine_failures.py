"""Copies and updates that fail, and too little memory: told at once, nothing moved, and training goes on."""

import gc
from types import SimpleNamespace

import pytest
import torch

from meft.gradient.offload_ring import GradientRing
from meft.table.row_step import update_rows
from meft.transport.transfer import Traffic
from tests.support.processes import run_together
from tests.support.thread_streams import CopyFailedError, ThreadStreams, on_streams
from tests.support.tiny_meft import STRATEGIES

PLACES = ["first", "middle", "last"]


def causes(error):
    while error is not None:
        yield error
        error = error.__cause__


def step(tiny, model, optimizer, seed, rows=2):
    """Two micro-batches with clipping."""
    optimizer.zero_grad()
    for micro in range(2):
        (tiny.loss(model, 2 * seed + micro, rows=rows) / 2).backward()
    torch.nn.utils.clip_grad_norm_(tiny.trainable(model), 0.5)
    optimizer.step()


def snapshot(tiny, model):
    """Masters, moments, counts, routers and what is read."""
    state = tiny.whole_state(model)
    for i, table in enumerate(tiny.tables(model)):
        with table.reading() as compute_copy:
            state[f"{i}.compute_copy"] = compute_copy.detach().clone()
    return state


def trained(tiny, fields, steps, **streams):
    model = tiny.adapted(layers=3, dtype=torch.float32, row_dtype="bfloat16", **fields)
    on_streams(model, **streams)
    optimizer = tiny.adamw(model)
    for seed, rows in steps:
        step(tiny, model, optimizer, seed, rows)
    return model, optimizer


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("stream", ["inbound", "outbound"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_failing_copy(tiny, strategy, stream, place):
    fields = {"retrieval": strategy, "backward_rows": "refetch"}
    model, optimizer = trained(tiny, fields, [(0, 2)])
    streams = model.base_model.engines["default"].streams
    before, first = snapshot(tiny, model), streams.numbers[stream]
    other, _ = trained(tiny, fields, [(0, 2)])
    other_streams = other.base_model.engines["default"].streams
    start = other_streams.numbers[stream]
    snapshot(tiny, other)
    step(tiny, other, _, 1)
    count = other_streams.numbers[stream] - start
    streams.failing = {(stream, first + {"first": 0, "middle": count // 2, "last": count - 1}[place])}
    with pytest.raises(RuntimeError) as failed:
        step(tiny, model, optimizer, 1)
    assert any(isinstance(error, CopyFailedError) for error in causes(failed.value))
    optimizer.zero_grad()
    tiny.assert_equal(snapshot(tiny, model), before)
    for seed in (1, 2):
        step(tiny, model, optimizer, seed)
    step(tiny, other, _, 2)
    tiny.assert_equal(snapshot(tiny, model), snapshot(tiny, other))
    (ring,) = model.base_model.engines["default"]._rings.values()
    for table in tiny.tables(model):
        table.synchronize()
    assert ring._free.qsize() == 4  # no slot is lost


def test_a_failing_update_is_told_at_the_next_use(tiny):
    model, optimizer = trained(tiny, {"retrieval": "stream"}, [(0, 2)])
    before = snapshot(tiny, model)
    calls = []

    def update(state, *args, **settings):
        calls.append(state)
        if len(calls) == 4:
            raise ValueError("what an update may raise")
        return update_rows(state, *args, **settings)

    for table in tiny.tables(model):
        table.step = update
    step(tiny, model, optimizer, 1)
    with pytest.raises(RuntimeError, match=r"The update of MEFT's values of layer 1 failed: what an update"):
        tiny.loss(model)
    after = snapshot(tiny, model)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in same if name[:2] == "3."} == {n for n in before if n[:2] == "3."}
    assert not {name for name in same if name.endswith("exp_avg") and name[:2] != "3."}
    step(tiny, model, optimizer, 2)
    tiny.loss(model)


class Full:
    """A hook that finds no memory, once."""

    def __init__(self, times=1):
        self.times = times

    def __call__(self, *args):
        if self.times:
            self.times -= 1
            raise torch.OutOfMemoryError("CUDA out of memory.")


def forward_hook(tiny, model, monkeypatch):
    tiny.layers(model)[1].base_layer.register_forward_pre_hook(Full())


def backward_hook(tiny, model, monkeypatch):
    """In the backward pass of the lowest layer, when those above have sent their gradients."""
    full = Full()
    layer = tiny.layers(model)[0]

    def watch(module, args, output):
        if output.requires_grad:
            output.register_hook(full)

    layer.register_forward_hook(watch)


def fetch(tiny, model, monkeypatch):
    """At the second allocation of a fetch."""
    real, full = torch.empty, Full()
    count = []

    def empty(*args, **kwargs):
        if kwargs.get("device") is not None:
            count.append(1)
            if len(count) == 2:
                full()
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", empty)


@pytest.mark.parametrize("where", [forward_hook, backward_hook, fetch])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_too_little_memory(tiny, monkeypatch, strategy, where):
    """The next, smaller batch trains on as if the larger one had never been tried."""
    fields = {"retrieval": strategy, "backward_rows": "refetch"}
    expected, _ = trained(tiny, fields, [(0, 2), (1, 1), (2, 2)])
    model, optimizer = trained(tiny, fields, [(0, 2)])
    before = snapshot(tiny, model) if strategy != "device-rows" else None  # once with rows that wait to be copied
    where(tiny, model, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        step(tiny, model, optimizer, 5, rows=4)
    monkeypatch.undo()
    optimizer.zero_grad()
    if before is not None:
        tiny.assert_equal(snapshot(tiny, model), before)
    step(tiny, model, optimizer, 1, rows=1)
    step(tiny, model, optimizer, 2)
    tiny.assert_equal(snapshot(tiny, model), snapshot(tiny, expected))


def test_a_backward_pass_behind_a_pass_that_failed_as_it_began_gets_a_sentence(tiny):
    model, _ = trained(tiny, {"retrieval": "stream", "backward_rows": "refetch"}, [])
    loss = tiny.loss(model)
    model.base_model.engines["default"]._forget()  # as where buffers for a larger batch find no memory
    with pytest.raises(RuntimeError, match=r"later forward pass failed.*run the forward pass again"):
        loss.backward()


@pytest.mark.parametrize("how", ["load", "step"])
def test_an_update_is_waited_for_where_its_lock_is_taken(tiny, how):
    """A load, or a second step, right behind a step."""
    model, optimizer = trained(tiny, {"retrieval": "stream"}, [(0, 2)])
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = []
    for i in range(10):
        for table in tiny.tables(model):
            table.rows.grad = torch.full_like(table.rows, 1e-3 * i)
        optimizer.step()
        if how == "load":
            model.load_state_dict(saved)
            gradients = [table.rows.detach().clone() for table in tiny.tables(model)]
    if how == "load":
        held = [value for name, value in saved.items() if name.endswith("rows")]
        assert {x.sum().item() for x in held} == {x.sum().item() for x in gradients}
    assert set(tiny.most_touches(model)) == {11}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_waits_for_readers(tiny, dtype):
    """They read memory that it gives back."""
    model = tiny.adapted(layers=1, dtype=torch.float32)
    waited = []
    for table in tiny.tables(model):
        table.add_reader_event(object(), SimpleNamespace(wait=lambda: waited.append(1)))
    model.to(dtype)
    assert len(waited) == 2


def test_readers_are_not_collected(tiny):
    """Marks of a generation that nothing is ever updated behind."""
    model = tiny.adapted(layers=2, retrieval="stream")
    on_streams(model)
    with torch.no_grad():
        for seed in range(5):
            tiny.loss(model, seed)
    assert all(len(table._readers) == 1 for table in tiny.tables(model))


def test_an_engine_that_is_made_anew_between_micro_batches(tiny):
    """As for another device or dtype: what its thread has brought is added up all the same."""
    model, plain = tiny.adapted(layers=2, retrieval="stream"), tiny.adapted(layers=2)
    for seed in range(3):
        on_streams(model)
        gc.collect()
        tiny.loss(model, seed).backward()
        tiny.loss(plain, seed).backward()
    on_streams(model)
    gc.collect()
    for table, other in zip(tiny.tables(model), tiny.tables(plain), strict=True):
        ours, theirs = table.rows.grad + table.rows.grad, other.rows.grad + other.rows.grad
        torch.testing.assert_close(ours.to_dense(), theirs.to_dense(), rtol=1e-9, atol=1e-12)


EXIT = """
from tests.support.thread_streams import on_streams
from tests.support.tiny_meft import Tiny
model = Tiny.adapted(layers=2, retrieval="stream")
streams = on_streams(model, longest=0.02)
optimizer = Tiny.adamw(model)
Tiny.loss(model).backward()
optimizer.step()
Tiny.loss(model).backward()  # gradients and an update are under way
streams.failing = {("outbound", streams.numbers["outbound"] + 2)}  # behind what the two layers tell of their picks
Tiny.loss(model).backward()
print("end")
"""


def test_no_thread_holds_the_interpreter(tmp_path):
    run_together(EXIT, [((), tmp_path / "said")], 60, ends=[0])
    assert (tmp_path / "said").read_text().endswith("end\n")


def test_a_gradient_that_did_not_arrive_ends_the_backward_pass_at_the_next_layer():
    streams = ThreadStreams(failing=[("outbound", 0)])
    ring = GradientRing(streams, 4, 3, torch.float32)
    table, rows, gradient = torch.zeros(8, 3), torch.arange(4), torch.ones(4, 3)
    first = ring.send(rows, gradient, table, Traffic())
    ring._thread.submit(lambda: None).result()  # it has been drained
    with pytest.raises(RuntimeError, match="did not arrive: copy 0 of the outbound stream"):
        ring.send(rows, gradient, table, Traffic())
    assert "arriving" in repr(first)
    streams.close()
