"""Page-locked staging buffers for small tensors, so that queueing a copy does not wait for it.

A slot holds one copy at a time. Taking it waits for the copy before, which is usually done by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from .streams import DeviceStreams, StreamEvent


class Slot:
    """Host memory for one copy at a time.

    Attributes:
        busy: the event after the copy; None: the memory is free.
    """

    def __init__(self, streams: DeviceStreams) -> None:
        self._streams = streams
        self._memory: dict[tuple[int, torch.dtype], Tensor] = {}
        self._last: dict[int, Tensor] = {}  # of each place, what was taken: in decoding it is asked for again
        self.busy: StreamEvent | None = None

    def take(self, *forms: tuple[Sequence[int], torch.dtype]) -> list[Tensor]:
        """Memory of these shapes and dtypes, once the copy before is done."""
        busy, self.busy = self.busy, None
        if busy is not None:
            with suppress(Exception):  # raised where the copy is used
                busy.wait()
        return [self._part(i, shape, dtype) for i, (shape, dtype) in enumerate(forms)]

    def _part(self, index: int, form: Sequence[int], dtype: torch.dtype) -> Tensor:
        last, shape = self._last.get(index), torch.Size(form)
        if last is not None and last.shape == shape and last.dtype == dtype:
            return last
        buffer = self._memory.get((index, dtype))
        if buffer is None or buffer.numel() < shape.numel():
            with torch.inference_mode(False):  # it outlives the mode
                buffer = self._memory[index, dtype] = self._streams.staging((shape.numel(),), dtype)
        part = self._last[index] = buffer[: shape.numel()].view(shape)
        return part


class Coming:
    """Copies of tensors of the device to the host, queued after what the computation has queued so far.

    Attributes:
        made: the event of the computation after which the tensors have their values.
    """

    def __init__(self, streams: DeviceStreams, tensors: Sequence[Tensor], free: list[Slot]) -> None:
        """Args: free: slots that are not in use; the one that is taken is put back when this object is deleted."""
        self._free = free
        try:
            self._slot = free.pop()
        except IndexError:  # other threads take some too
            self._slot = Slot(streams)
        self._copies = self._slot.take(*((tensor.shape, tensor.dtype) for tensor in tensors))
        self.made = streams.record_event()
        streams.outbound.wait_event(self.made)
        try:
            streams.outbound.run(partial(copy_all, self._copies, tensors), tensors)
        finally:  # also where some were queued
            self._slot.busy = streams.outbound.record_event()

    def wait(self) -> list[Tensor]:
        """Wait for the copies; their memory may be used for as long as this object lives.

        Raises the error of the copies.
        """
        event, self._slot.busy = self._slot.busy, None
        if event is not None:
            event.wait()
        return self._copies

    def __del__(self) -> None:
        self._free.append(self._slot)


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target, for a stream."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=True)


def sent(streams: DeviceStreams, tensor: Tensor, free: list[Slot]) -> tuple[Tensor, StreamEvent]:
    """Queue the copy of a small tensor of the host to the device.

    Args:
        free: slots that take turns.

    Returns:
        the copy, in memory of the inbound stream, and the event after which it is there.
    """
    slot = free.pop(0) if len(free) > 3 else Slot(streams)
    try:
        (staged,) = slot.take((tensor.shape, tensor.dtype))
        staged.copy_(tensor)
        copy = streams.inbound.empty(tuple(tensor.shape), tensor.dtype)
        try:
            streams.inbound.run(partial(copy.copy_, staged, non_blocking=True), [copy])
        finally:  # also where it was queued
            arrival = slot.busy = streams.inbound.record_event()
        return copy, arrival
    finally:
        free.append(slot)
