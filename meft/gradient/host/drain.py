"""The host's pass over row gradients that were copied from the device: widens them and sums their squares.

It uses the C++ library of `meft.table.row_step` where it was built, else torch operations, which read the values once
more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adapter_kernels.runtime.host_threads import host_threads

from ...table.row_step import native_library

_BLOCK = 1 << 20  # values that torch widens to double at a time


def drain(source: Tensor, target: Tensor) -> float | None:
    """Copy gradients out of a staging buffer into memory of their own.

    Args:
        source: [n, d], the staging buffer.
        target: [n, d] float32 or float64, contiguous, in host memory.

    Returns:
        the sum of the squares, in double: finite if and only if all values are. None for float64.
    """
    library = native_library()
    if library is not None and target.dtype == torch.float32 and source.is_contiguous():
        native = {torch.bfloat16: library.meft_drain_bfloat16, torch.float32: library.meft_drain_float}
        if source.dtype in native:
            sizes = len(target), target.shape[1], host_threads()
            return float(native[source.dtype](source.data_ptr(), target.data_ptr(), *sizes))
    target.copy_(source)
    return squares(target)


def squares(values: Tensor) -> float | None:
    """The sum of the squares of values [n, d], as of `drain`; they are read once."""
    if values.dtype != torch.float32:
        return None
    library = native_library()
    if library is not None and values.is_contiguous():
        return float(library.meft_squares(values.data_ptr(), len(values), values.shape[1], host_threads()))
    rows = max(1, _BLOCK // max(1, values.shape[1]))
    return sum((float(part.double().square_().sum()) for part in values.split(rows)), 0.0)
