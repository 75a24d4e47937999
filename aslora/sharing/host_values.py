"""A small integer buffer read without waiting for its device."""

from __future__ import annotations

import torch
from torch import Tensor

from .ties import on_host


class HostValues:
    """What a buffer held when it was last read or written here, so that a read need not synchronise with its device.

    Buffers on the CPU are always read themselves.
    """

    def __init__(self) -> None:
        self._known: tuple[Tensor, list[int]] | None = None  # a copy on the device, and its values

    def read(self, buffer: Tensor) -> list[int]:
        """The values, unless they were written from outside (see `differ`)."""
        if on_host(buffer):
            return list(buffer.tolist())
        if self._known is None:
            self._known = (buffer.clone(), buffer.tolist())
        return self._known[1]

    def write(self, buffer: Tensor, values: list[int]) -> None:
        """Write the values into the buffer."""
        buffer.copy_(torch.tensor(values, device="cpu"), non_blocking=True)
        if not on_host(buffer):
            self._known = (buffer.clone(), values)

    def forget(self) -> None:
        """Read the buffer itself when it is next needed."""
        self._known = None

    def differ(self, buffer: Tensor) -> bool | Tensor:
        """Whether the buffer was written from outside: on a device as a tensor, without waiting."""
        if self._known is None or on_host(buffer):
            return False
        copy = self._known[0]
        return True if copy.device != buffer.device else (copy != buffer).any()
