"""Copy streams: work beside the computation in an order of its own, and events that others can wait for.

On a CUDA device these are CUDA streams and events. On the CPU work is done where it is asked for. The engine is written
against these few operations alone, so that tests put threads with random delays in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .transfer import page_locked


class StreamEvent(Protocol):
    """A point in the order of a stream, or of the computation."""

    def wait(self) -> None:
        """Let the calling thread wait until all work before the event is done; raises what that work raised."""


class CopyStream(Protocol):
    """Work that is done in its order, beside the computation."""

    def run(self, work: Callable[[], object], uses: Sequence[Tensor] = ()) -> None:
        """Queue `work`; of the device's memory it takes none that leaves the stream.

        Args:
            uses: tensors of the computation that the work reads or writes.
        """

    def wait_event(self, event: StreamEvent) -> None:
        """What is queued from now on waits for the event; the calling thread does not."""

    def record_event(self) -> StreamEvent:
        """The point after all that is queued so far."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory into which the stream writes without a wait for the computation; see `DeviceStreams.use`.

        A stream that is another thread makes no inference tensors, which that could not write into.
        """


class DeviceStreams(Protocol):
    """The streams of one device.

    Attributes:
        device: where the computation runs.
        inbound: to the device. outbound: to the host. updating: both ways, for steps of rows by the device.
    """

    device: torch.device
    inbound: CopyStream
    outbound: CopyStream
    updating: CopyStream

    def record_event(self) -> StreamEvent:
        """The point after all that the computation has queued so far."""

    def wait_event(self, event: StreamEvent) -> None:
        """What the computation queues from now on waits for the event."""

    def use(self, tensors: Sequence[Tensor]) -> None:
        """The computation reads a stream's memory (`CopyStream.empty`) from now on: it stays until that is through."""

    def staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Host memory for copies from and to the device."""


class _Done:
    """An event that has been reached."""

    def wait(self) -> None: ...


_DONE = _Done()


class _AtOnce:
    """The stream of a CPU: work is done when it is queued."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def run(self, work: Callable[[], object], uses: Sequence[Tensor] = ()) -> None:
        work()

    def wait_event(self, event: StreamEvent) -> None: ...

    def record_event(self) -> StreamEvent:
        return _DONE

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)


class HostStreams:
    """For a model on the CPU, or on a device without streams: nothing runs beside anything."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.inbound: CopyStream = _AtOnce(device)
        self.outbound: CopyStream = _AtOnce(device)
        self.updating: CopyStream = _AtOnce(device)

    def record_event(self) -> StreamEvent:
        return _DONE

    def wait_event(self, event: StreamEvent) -> None: ...

    def use(self, tensors: Sequence[Tensor]) -> None: ...

    def staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cpu")


class _Event:
    """A CUDA event; waiting for it sleeps and does not spin."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event(blocking=True)
        self.event.record(stream)

    def wait(self) -> None:
        self.event.synchronize()


class _Stream:
    """A CUDA stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Before the computation: a gather's few programs need not wait until a GEMM has placed all of its own.
        self.stream = torch.cuda.Stream(device, priority=-1)

    def run(self, work: Callable[[], object], uses: Sequence[Tensor] = ()) -> None:
        try:
            # On leaving, `stream` sets the device that was current before it, which would get a context.
            with torch.cuda.device(self.stream.device), torch.cuda.stream(self.stream):
                work()
        finally:  # also where some of the work was queued before it failed
            for tensor in uses:
                if tensor.is_cuda:  # its memory is not given to another tensor before this stream is through
                    tensor.record_stream(self.stream)

    def wait_event(self, event: StreamEvent) -> None:
        assert isinstance(event, _Event)
        self.stream.wait_event(event.event)

    def record_event(self) -> StreamEvent:
        return _Event(self.stream)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        # Of the stream's own memory. The computation's may be such as it has given back, but not done with yet.
        with torch.cuda.device(self.stream.device), torch.cuda.stream(self.stream):
            return torch.empty(shape, dtype=dtype, device=self.device)


class CudaStreams:
    """Streams beside the one that computes: a device has a copy engine each way."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.inbound: CopyStream = _Stream(device)
        self.outbound: CopyStream = _Stream(device)
        self.updating: CopyStream = _Stream(device)

    def record_event(self) -> StreamEvent:
        return _Event(torch.cuda.current_stream(self.device))

    def wait_event(self, event: StreamEvent) -> None:
        assert isinstance(event, _Event)
        torch.cuda.current_stream(self.device).wait_event(event.event)

    def use(self, tensors: Sequence[Tensor]) -> None:
        stream = torch.cuda.current_stream(self.device)
        for tensor in tensors:
            tensor.record_stream(stream)

    def staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return page_locked(shape, dtype, self.device)


def streams_of(device: torch.device) -> DeviceStreams:
    """The streams of a device."""
    return CudaStreams(device) if device.type == "cuda" else HostStreams(device)
