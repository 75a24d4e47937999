"""The mean over ranks of gradients of which each rank has some rows, in the order of the ranks.

It uses the C++ library of `meft.table.row_step` where it was built, which reads each value once, else torch operations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_kernels.runtime.host_threads import host_threads

from ...table.row_step import native_library
from .drain import squares


@dataclass(frozen=True)
class RowsOfRanks:
    """What ranks have of some rows.

    Attributes:
        masks: uint8 [ranks, r], 1 where a rank has a row; rows may be longer, which are contiguous by themselves.
        rows: int64 [n], ascending.
        values: of each rank [n, d], of which the first are those of its rows, ascending; equally far apart in memory.
    """

    masks: Tensor
    rows: Tensor
    values: list[Tensor]

    def mean(self, part: slice, divisor: int, out: Tensor) -> float | None:
        """Write the sum over the ranks over `divisor`, of `rows[part]`, to `out`.

        Returns:
            the sum of the squares, as `drain`; None for float64.
        """
        library = native_library()
        if library is None or out.dtype != torch.float32:
            return self._mean_by_torch(part, divisor, out)
        first = self.values[0]
        stride = (self.values[-1].data_ptr() - first.data_ptr()) // (max(1, len(self.values) - 1) * out.element_size())
        return float(
            library.meft_mean_rows(
                self.masks.data_ptr(), self.masks.stride(0), first.data_ptr(), stride, len(self.values),
                self.rows.data_ptr(), part.start, part.stop, out.shape[1], divisor, out.data_ptr(), host_threads(),
            )
        )  # fmt: skip

    def _mean_by_torch(self, part: slice, divisor: int, out: Tensor) -> float | None:
        masks = self.masks[:, self.rows].bool()
        before = masks[:, : part.start].sum(1).tolist()
        out.zero_()
        for rank, (mask, offset) in enumerate(zip(masks[:, part], before, strict=True)):
            own = mask.nonzero().flatten()
            out.index_add_(0, own, self.values[rank][offset : offset + len(own)])
        return squares(out.div_(divisor))
