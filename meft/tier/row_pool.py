"""Memory on a device for rows with all that a step of them reads and writes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from adapter_kernels import RowState

from ..table.moments import RowMoments
from ..table.row_table import RowTable, without_copy
from ..transport.staging import Coming, Slot
from ..transport.streams import DeviceStreams

_BLOCK_BYTES = 16 << 20  # of rows that come home at a time

# Of each tensor of a `RowState` by its name: the shape and dtype of one row.
Form = dict[str, tuple[tuple[int, ...], torch.dtype]]


def form_of(table: RowTable, entry: RowMoments) -> Form:
    """What a place for a row of a table, with the moments of an entry, consists of."""
    tensors = {"table": table.masters, **entry.held.tensors()}
    form = {name: (tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in tensors.items()}
    if table.compute_dtype != table.masters.dtype:
        form["compute_copy"] = form["table"][0], table.compute_dtype
    return form


def place_bytes(form: Form) -> int:
    """Bytes of one place, and of the gradient that its row may have, in float32 or more."""
    shape, dtype = form["table"]
    gradient = math.prod(shape) * torch.promote_types(dtype, torch.float32).itemsize
    return gradient + sum(math.prod(shape) * dtype.itemsize for shape, dtype in form.values())


class RowPool:
    """Places for rows of one form; who has which place is up to others.

    Attributes:
        state: tensors [places, ...].
    """

    def __init__(self, form: Form, places: int, device: torch.device) -> None:
        self.form = form
        with torch.inference_mode(False):  # it outlives the mode
            room = {
                name: torch.zeros((places, *shape), dtype=dtype, device=device) for name, (shape, dtype) in form.items()
            }
        self.state = RowState(**room)

    @property
    def read(self) -> Tensor:
        """The rows as the computation reads them, [places, d]."""
        return self.state.table if self.state.compute_copy is None else self.state.compute_copy

    def rows(self, places: Tensor) -> list[Tensor]:
        """Copies of some rows, of each tensor of `without_copy`."""
        return [tensor.index_select(0, places) for tensor in without_copy(self.state)]

    def put(self, places: Tensor, values: Sequence[Tensor]) -> None:
        """Write rows, of each tensor of `without_copy`."""
        for tensor, rows in zip(without_copy(self.state), values, strict=True):
            tensor.index_copy_(0, places, rows)
        if self.state.compute_copy is not None:
            self.state.compute_copy.index_copy_(0, places, values[0].to(self.state.compute_copy.dtype))


def brought_home(
    pool: RowPool, places: Tensor, streams: DeviceStreams, slots: list[Slot]
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Rows of a pool in host memory, block by block; smaller ones where the device has no memory for them.

    Args:
        places: int64 [n] on the device.

    Yields:
        which of the places, and copies of each tensor of `without_copy`, for as long as the generator rests.
    """
    size, start = max(1, _BLOCK_BYTES // max(1, sum(t[:1].nbytes for t in pool.state.tensors()))), 0
    while start < len(places):
        size = min(size, len(places) - start)
        block = slice(start, start + size)
        try:
            coming = Coming(streams, pool.rows(places[block]), slots)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size //= 2
            continue
        yield block, coming.wait()
        start += size
