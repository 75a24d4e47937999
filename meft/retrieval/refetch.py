"""Re-gathers a layer's rows in its backward pass instead of saving them, the layer below's ahead of their use."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from ..transport.streams import DeviceStreams
from .types import GatheredRows, PendingForward


class Fetcher(Protocol):
    """Who gathers rows again.

    Attributes:
        streams: in whose order they arrive.
    """

    streams: DeviceStreams | None

    def gather_again(self, pending: PendingForward) -> GatheredRows:
        """Queue the way of a layer's rows; raises RuntimeError where they have been updated."""


class RefetchedRows:
    """Rows of one layer in one pass that its graph names instead of keeping."""

    def __init__(
        self, engine: Fetcher, pending: PendingForward, dtype: torch.dtype, below: RefetchedRows | None
    ) -> None:
        self.engine, self.pending, self.dtype = engine, pending, dtype
        self._below = weakref.ref(below) if below is not None else None
        self._rows: GatheredRows | None = None
        self._taken = 0

    def bring(self) -> GatheredRows:
        """Queue their way, once."""
        if self._rows is None:
            self._rows = self.engine.gather_again(self.pending)
            self._taken = 0
        return self._rows

    def take(self, which: int) -> Tensor:
        """Keys (0) or values (1), [u, d]."""
        rows = self.bring()
        below = self._below() if self._below is not None else None
        if below is not None:
            below.bring()
        assert self.engine.streams is not None
        self._rows = rows = rows.arrived(self.engine.streams)
        self._taken += 1
        if self._taken == 2:  # the backward pass has both
            self._rows = None
        return (rows.keys, rows.values)[which].to(self.dtype)


@contextmanager
def refetched_in_backward(
    engine: Fetcher, pending: PendingForward, rows: tuple[Tensor, Tensor], below: RefetchedRows | None
) -> Iterator[RefetchedRows | None]:
    """Let what is recorded in the block not keep `rows`.

    Args:
        below: what was yielded for the layer below.
    """
    if not rows[0].numel():
        yield None
        return
    absent = RefetchedRows(engine, pending, rows[0].dtype, below)
    addresses = [row.data_ptr() for row in rows]

    def pack(tensor: Tensor) -> Any:
        if tensor.shape == rows[0].shape and tensor.data_ptr() in addresses:
            return absent, addresses.index(tensor.data_ptr())
        return tensor

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed[0].take(packed[1])

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield absent
