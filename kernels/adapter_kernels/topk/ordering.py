"""The n largest of each row with ties to the lower index, which torch.topk alone does not promise."""

from __future__ import annotations

import torch
from torch import Tensor

_FEW = 2560  # measured on a CPU: 8 rows of 320 take 31 microseconds against 46; 512 rows 6.7 ms against 2.5


def stable_topk(values: Tensor, n: int) -> Tensor:
    """Indices, int64 [T, n], of the n largest of each row in descending order.

    NaN counts as larger than +inf, -0.0 equals 0.0. As in the kernels a value becomes an int32 of the same order, and
    that and the reversed index one int64: no two are equal, so a partial sort finds what a stable full one would.

    Args:
        values: [T, m], any float dtype; float64, which does not fit, is sorted in full, and so are few values, for
            which that is one operation in place of nine.
    """
    if values.dtype == torch.float64 or (values.is_cpu and values.numel() <= _FEW):
        return torch.sort(values, dim=1, descending=True, stable=True).indices[:, :n]
    m = values.shape[1]
    single = values.to(torch.float32) + 0.0  # -0.0 becomes 0.0
    bits = single.view(torch.int32)
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).masked_fill_(single.isnan(), 0x7FFFFFFF)
    reverse = torch.arange(m - 1, -1, -1, device=values.device)
    return m - 1 - (order.to(torch.int64) * m + reverse).topk(n, dim=1).values.remainder_(m)
