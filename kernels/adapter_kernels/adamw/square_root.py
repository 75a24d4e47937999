"""The correctly rounded square root."""

from __future__ import annotations

import torch
from torch import Tensor


def square_root(x: Tensor, out: Tensor | None = None) -> Tensor:
    """torch.sqrt of float32 on the CPU can be off by one unit in the last place."""
    if not (x.is_cpu and x.dtype == torch.float32):
        return torch.sqrt(x, out=out)
    root = x.double().sqrt_()
    return root.to(torch.float32) if out is None else out.copy_(root)
