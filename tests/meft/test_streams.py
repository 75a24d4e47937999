"""CUDA streams over a stand-in for torch.cuda: what waits for what, on which device, and until when memory is kept."""

from contextlib import suppress

import pytest
import torch

from meft.transport.streams import CudaStreams, HostStreams
from tests.support.fake_cuda import FakeCuda
from tests.support.tiny_meft import ROWS, STRATEGIES

THERE = torch.device("cuda", 1)


@pytest.fixture
def fake(monkeypatch):
    return lambda device="cpu": FakeCuda(monkeypatch, device)


def streams_by_name(streams):
    return {name: getattr(streams, name) for name in ("inbound", "outbound", "updating")}


# --------------------------------------------------------------------------------------------------------- one by one


def test_each_stream_is_a_stream_of_its_own_before_the_computation(fake):
    cuda, streams = fake(THERE), CudaStreams(THERE)
    streams = [stream.stream for stream in streams_by_name(streams).values()]
    assert streams == cuda.streams
    assert len(set(map(id, streams))) == 3
    assert all(stream.device == THERE and stream.priority == -1 for stream in streams)


def test_here_and_join_are_of_the_stream_that_computes_on_the_streams_device(fake):
    cuda, streams = fake(THERE), CudaStreams(THERE)
    event = streams.record_event()
    assert cuda.notes == [("record", cuda.computation, event.event)]
    streams.wait_event(streams.inbound.record_event())
    assert cuda.notes[-1][:2] == ("wait", cuda.computation)
    assert cuda.asked == [THERE, THERE]  # not the thread's current device
    beside = cuda._stream(THERE)
    with torch.cuda.stream(beside):  # whoever computes on another stream is waited for there
        assert streams.record_event().event.stream is beside


@pytest.mark.parametrize("name", ["inbound", "outbound", "updating"])
def test_a_mark_is_an_event_of_its_stream_that_sleeps(fake, name):
    cuda, streams = fake(THERE), CudaStreams(THERE)
    stream, done = getattr(streams, name), []
    stream.run(lambda: done.append(1))
    event = stream.record_event()
    stream.run(lambda: done.append(2))
    assert event.event.stream is stream.stream
    assert event.event.blocking
    assert done == []
    event.wait()  # for what was queued before it, and no more
    assert done == [1]
    assert cuda.notes[-1] == ("synchronize", None, event.event)


def test_a_stream_waits_for_a_mark_and_nobody_else_does(fake):
    cuda, streams = fake(THERE), CudaStreams(THERE)
    done = []
    streams.inbound.run(lambda: done.append("rows"))
    streams.outbound.wait_event(streams.inbound.record_event())
    streams.outbound.run(lambda: done.append("gradients"))
    assert cuda.notes[-1][:2] == ("wait", streams.outbound.stream)
    assert done == []
    streams.outbound.record_event().wait()
    assert done == ["rows", "gradients"]


def test_the_memory_of_all_uses_is_kept_for_the_stream_also_where_work_fails(fake):
    cuda, streams = fake(THERE), CudaStreams(THERE)
    uses = [torch.ones(2), torch.ones(3)]
    streams.outbound.run(lambda: None, uses)
    cuda.full = True
    with pytest.raises(RuntimeError, match="nothing more"):
        streams.inbound.run(lambda: None, uses)
    for tensor in uses:
        kept = cuda.recorded[tensor.untyped_storage().data_ptr()]
        assert kept == [streams.outbound.stream, streams.inbound.stream]
    assert not cuda.current


def test_memory_of_a_stream_is_its_streams_and_kept_for_the_computation(fake):
    cuda, streams = fake(), CudaStreams(torch.device("cpu"))
    rows = streams.inbound.empty((2, 3), torch.bfloat16)
    assert (rows.shape, rows.dtype) == ((2, 3), torch.bfloat16)
    assert cuda.made == [(streams.inbound.stream, rows.untyped_storage().data_ptr())]
    streams.use([rows])
    assert cuda.recorded[rows.untyped_storage().data_ptr()] == [cuda.computation]


def test_staging_is_page_locked(fake):
    cuda, streams = fake(THERE), CudaStreams(THERE)
    assert streams.staging((2, 3), torch.float32) is cuda.staged[0]


# --------------------------------------------------------------------------------------------------------- the engine


def trained(tiny, streams, zero_copy=False, **fields):
    """Losses and whole state after some steps of two micro-batches each, the model, and the streams."""
    fields = {"row_optimizer": {"zero_copy": zero_copy}, "master_dtype": "float32"} | fields
    model = tiny.adapted(layers=3, dtype=torch.bfloat16, **fields)
    for engine in model.base_model.engines.values():
        engine.use(streams)
    optimizer, losses = tiny.adamw(model, lr=2e-2), []
    for step in range(3):
        for micro in range(2):
            loss = tiny.loss(model, 2 * step + micro)
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(tiny.trainable(model), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses), tiny.whole_state(model), model


def on_the_host(cuda, tiny, model):
    """Addresses of memory that is the host's: tables, what is read of them, moments, staging."""
    found = list(cuda.staged)
    for table in tiny.tables(model):
        with table.reading() as compute_copy:
            found += [table.rows, compute_copy]
        found += table.moments.tensors().values()
    return {tensor.untyped_storage().data_ptr() for tensor in found}


@pytest.mark.parametrize("zero_copy", [False, True])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_whoever_needs_something_waits_for_it(tiny, fake, strategy, rows, zero_copy):
    """Streams are as late as they can be, and the result is that of copies that are done at once."""
    fields = {"retrieval": strategy, "backward_rows": rows, "zero_copy": zero_copy}
    losses, state, _ = trained(tiny, HostStreams(torch.device("cpu")), **fields)
    cuda = fake()
    late_losses, late_state, _ = trained(tiny, CudaStreams(torch.device("cpu")), **fields)
    assert torch.equal(losses, late_losses)
    tiny.assert_equal(late_state, state)
    busy = {stream for stream, _ in cuda.used}
    assert len(busy) == 2 + zero_copy
    assert {event.stream for kind, _, event in cuda.notes} == busy | {cuda.computation}
    assert set(cuda.asked) == {torch.device("cpu")}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_memory_of_the_device_is_kept_for_each_stream_that_uses_it(tiny, fake, strategy, rows):
    cuda = fake()
    _, _, model = trained(tiny, CudaStreams(torch.device("cpu")), retrieval=strategy, backward_rows=rows)
    host = on_the_host(cuda, tiny, model)
    used = [(stream, tensor) for stream, tensor in cuda.used if tensor.untyped_storage().data_ptr() not in host]
    assert len(used) > 20
    for stream, tensor in used:
        kept = cuda.recorded.get(tensor.untyped_storage().data_ptr(), [])
        assert stream in kept, f"{tensor.dtype} {list(tensor.shape)}"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_wait_that_is_left_out_shows(tiny, fake, monkeypatch, strategy):
    losses, _, _ = trained(tiny, HostStreams(torch.device("cpu")), retrieval=strategy)
    fake()
    monkeypatch.setattr(CudaStreams, "wait_event", lambda streams, event: None)
    with suppress(IndexError):  # ids of `host` that are not there yet
        assert not torch.equal(trained(tiny, CudaStreams(torch.device("cpu")), retrieval=strategy)[0], losses)
