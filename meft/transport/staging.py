"""Page-locked memory through which small tensors cross, so that nobody waits for a copy where it is queued.

A slot holds one copy after the other. Whoever takes it waits until the copy before is through, which it is by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from .streams import DeviceStreams, StreamEvent


class Slot:
    """Host memory of one copy at a time.

    Attributes:
        busy: the event after which the copy is through; None: the memory is free.
    """

    def __init__(self, streams: DeviceStreams) -> None:
        self._streams = streams
        self._memory: dict[tuple[int, torch.dtype], Tensor] = {}
        self.busy: StreamEvent | None = None

    def take(self, *forms: tuple[Sequence[int], torch.dtype]) -> list[Tensor]:
        """Memory of these shapes and dtypes, once the copy before is through."""
        busy, self.busy = self.busy, None
        if busy is not None:
            with suppress(Exception):  # whoever uses what was copied is told
                busy.wait()
        return [self._part(i, torch.Size(shape), dtype) for i, (shape, dtype) in enumerate(forms)]

    def _part(self, place: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        held = self._memory.get((place, dtype))
        if held is None or held.numel() < shape.numel():
            with torch.inference_mode(False):  # it outlives the mode
                held = self._memory[place, dtype] = self._streams.staging((shape.numel(),), dtype)
        return held[: shape.numel()].view(shape)


class Coming:
    """Copies of tensors of the device, as the computation leaves them, on their way to the host.

    Attributes:
        made: the point of the computation from which on the tensors have their values.
    """

    def __init__(self, streams: DeviceStreams, tensors: Sequence[Tensor], free: list[Slot]) -> None:
        """Args: free: slots that nobody uses; the one that is taken comes back, also if nobody waits for the copies."""
        self._free, self._slot = free, free.pop() if free else Slot(streams)
        self._here = self._slot.take(*((tensor.shape, tensor.dtype) for tensor in tensors))
        self.made = streams.record_event()
        streams.outbound.wait_event(self.made)
        try:
            streams.outbound.run(partial(_copy_all, self._here, tensors), tensors)
        finally:  # also where some were queued
            self._slot.busy = streams.outbound.record_event()

    def wait(self) -> list[Tensor]:
        """Wait for the copies; their memory is lent for as long as this object lives.

        Raises what went wrong on their way.
        """
        event, self._slot.busy = self._slot.busy, None
        if event is not None:
            event.wait()
        return self._here

    def __del__(self) -> None:
        self._free.append(self._slot)


def _copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=True)
