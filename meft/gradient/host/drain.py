"""The host's pass over row gradients that were copied from the device: widens them and sums their squares.

It uses the C++ library of `meft.table.row_step` where it was built, else torch operations, which read the values once
more. The sum of a row does not depend on the rows beside it, and rows are added up in their order: the norm is the same
wherever they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adapter_kernels.runtime.host_threads import host_threads

from ...table.row_step import native_library

_BLOCK = 1 << 20  # values that torch widens to double at a time


def drain(source: Tensor, target: Tensor) -> Tensor | None:
    """Copy gradients out of a staging buffer into memory of their own.

    Args:
        source: [n, d], the staging buffer.
        target: [n, d] float32 or float64, contiguous, in host memory.

    Returns:
        the sum of the squares of each row, float64 [n]: finite if and only if all its values are. None for float64.
    """
    library = native_library()
    if library is not None and target.dtype == torch.float32 and source.is_contiguous():
        native = {torch.bfloat16: library.meft_drain_bfloat16, torch.float32: library.meft_drain_float}
        if source.dtype in native:
            sums = torch.empty(len(target), dtype=torch.float64, device="cpu")
            sizes = len(target), target.shape[1], host_threads()
            native[source.dtype](source.data_ptr(), target.data_ptr(), sums.data_ptr(), *sizes)
            return sums
    target.copy_(source)
    return row_squares(target)


def row_squares(values: Tensor) -> Tensor | None:
    """The sum of the squares of each row of values [n, d], as of `drain`, where they are; they are read once."""
    if values.dtype != torch.float32:
        return None
    library = native_library()
    if library is not None and values.is_cpu and values.is_contiguous():
        sums = torch.empty(len(values), dtype=torch.float64, device="cpu")
        library.meft_squares(values.data_ptr(), sums.data_ptr(), len(values), values.shape[1], host_threads())
        return sums
    rows = max(1, _BLOCK // max(1, values.shape[1]))
    parts = [part.double().square_().sum(1) for part in values.split(rows)]
    return torch.cat(parts) if parts else values.new_zeros(0, dtype=torch.float64)


def total(sums: Tensor | None) -> float | None:
    """The sum over rows, in their order; of host memory."""
    if sums is None:
        return None
    return float(sums.cumsum(0)[-1]) if len(sums) else 0.0


def squares(values: Tensor) -> float | None:
    """The sum of the squares of values [n, d]; None for float64."""
    return total(row_squares(values))
