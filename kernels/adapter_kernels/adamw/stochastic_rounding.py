"""Stochastic rounding to bfloat16 from a counter-based generator: the noise is a hash, so it needs no state."""

from __future__ import annotations

import torch
from torch import Tensor

_NOISE = 0xFFFF  # the bits of a float32 that bfloat16 has not


def round_stochastically(p: Tensor, rows: Tensor, number: Tensor, seed: int) -> None:
    """Round float32 [k, d] in place to values of bfloat16, up or down with the probabilities that keep the mean.

    Args:
        rows: int64 [k], and `number`: [k] or [], with `seed` and the column what the noise is a hash of (splitmix64 of
            seed, row and number; then lowbias32 over the columns).
    """

    def signed(constant: int) -> int:
        return (constant + (1 << 63)) % (1 << 64) - (1 << 63)

    number = number.to(device=rows.device, dtype=torch.int64)
    key = rows * signed(0x9E3779B97F4A7C15) + number * signed(0xD1342543DE82EF95) + signed(seed * 0xDA942042E4DD58B5)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        key = (key ^ ((key >> shift) & ((1 << (64 - shift)) - 1))) * signed(factor)
    key = key ^ ((key >> 31) & ((1 << 33) - 1))
    first, second = key.view(torch.int32).reshape(-1, 2, 1).unbind(1)
    noise = first + torch.arange(p.shape[1], dtype=torch.int32, device=p.device) * -1640531535  # 0x9E3779B1
    noise = (noise ^ ((noise >> 16) & 0xFFFF)) * 0x7FEB352D
    noise = (noise ^ ((noise >> 15) & 0x1FFFF) ^ second) * -2073254261  # 0x846CA68B
    noise = (noise ^ (noise >> 16)) & _NOISE
    rounded = ((p.view(torch.int32) + noise) & ~_NOISE).view(torch.float32)
    p.copy_(torch.where(p.isfinite(), rounded, p))
