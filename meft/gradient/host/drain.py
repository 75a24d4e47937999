"""The host's pass over row gradients that were copied from the device: keeps or widens them and sums their squares.

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
        target: [n, d], contiguous, in host memory, in float32, float64 or the dtype of `source`.

    Returns:
        the sum of the squares of each row, float64 [n]: finite if and only if all its values are. None for float64.
    """
    library = native_library()
    if library is not None and source.is_contiguous() and _known(source) and _known(target):
        sums = torch.empty(len(target), dtype=torch.float64, device="cpu")
        halves, sizes = (_half(source), _half(target)), (len(target), target.shape[1], host_threads())
        library.meft_drain(*halves, source.data_ptr(), target.data_ptr(), sums.data_ptr(), *sizes)
        return sums
    target.copy_(source)
    return row_squares(target)


def row_squares(values: Tensor) -> Tensor | None:
    """The sum of the squares of each row of values [n, d], as of `drain`, where they are; they are read once."""
    if not _known(values):
        return None
    library = native_library()
    if library is not None and values.is_cpu and values.is_contiguous():
        sums = torch.empty(len(values), dtype=torch.float64, device="cpu")
        sizes = len(values), values.shape[1], host_threads()
        library.meft_drain(_half(values), False, values.data_ptr(), None, sums.data_ptr(), *sizes)
        return sums
    rows = max(1, _BLOCK // max(1, values.shape[1]))
    parts = [part.double().square_().sum(1) for part in values.split(rows)]
    return torch.cat(parts) if parts else values.new_zeros(0, dtype=torch.float64)


def _known(values: Tensor) -> bool:
    return values.dtype in (torch.float32, torch.bfloat16)


def _half(values: Tensor) -> bool:
    return values.dtype == torch.bfloat16


def total(sums: Tensor | None) -> float | None:
    """The sum over rows, in their order; of host memory."""
    if sums is None:
        return None
    return float(sums.cumsum(0)[-1]) if len(sums) else 0.0


def squares(values: Tensor) -> float | None:
    """The sum of the squares of values [n, d]; None for float64."""
    return total(row_squares(values))
