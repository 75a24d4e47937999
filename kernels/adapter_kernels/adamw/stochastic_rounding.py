"""Stochastic rounding to bfloat16 from a counter-based generator: the noise is a hash, so it needs no state."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 0xFFFF  # those of a float32 that bfloat16 has not


def _signed(constant: int) -> int:
    return (constant + (1 << 63)) % (1 << 64) - (1 << 63)


def row_keys(rows: Tensor, number: Tensor, seed: int) -> Tensor:
    """Of each row what its noise is made of, int64 [k]: splitmix64 of seed, row and number.

    Args:
        rows: int64 [k].
        number: [k] or [], e.g. of the step.
    """
    number = number.to(device=rows.device, dtype=torch.int64)
    key = rows * _signed(0x9E3779B97F4A7C15) + number * _signed(0xD1342543DE82EF95) + _signed(seed * 0xDA942042E4DD58B5)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        key = (key ^ ((key >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return key ^ ((key >> 31) & ((1 << 33) - 1))


def noise_of(keys: Tensor, columns: int) -> Tensor:
    """32 bits of noise for each value of the rows, int32 [k, columns]: lowbias32 over the columns."""
    first, second = keys.view(torch.int32).reshape(-1, 2, 1).unbind(1)
    noise = first + torch.arange(columns, dtype=torch.int32, device=keys.device) * -1640531535  # 0x9E3779B1
    noise = (noise ^ ((noise >> 16) & 0xFFFF)) * 0x7FEB352D
    noise = (noise ^ ((noise >> 15) & 0x1FFFF) ^ second) * -2073254261  # 0x846CA68B
    return noise ^ ((noise >> 16) & 0xFFFF)


def second_noise(noise: Tensor) -> Tensor:
    """16 bits for a second value: the half that the first, which is a master, does not take."""
    return (noise >> 16) & BITS


def third_noise(noise: Tensor) -> Tensor:
    """16 bits for a third value."""
    return ((noise * 0x2C1B3C6D) >> 16) & BITS


def rounded(values: Tensor, noise: Tensor) -> Tensor:
    """float32 values as bfloat16, up or down with the probabilities that keep the mean.

    Args:
        noise: int32 of the same shape, 16 bits each.
    """
    bits = values.view(torch.int32)
    return (torch.where(values.isfinite(), bits + noise, bits) >> 16).to(torch.int16).view(torch.bfloat16)


def round_stochastically(p: Tensor, rows: Tensor, number: Tensor, seed: int) -> None:
    """Round float32 [k, d] in place to values of bfloat16.

    Args:
        rows, number, seed: as in `row_keys`.
    """
    p.copy_(rounded(p, noise_of(row_keys(rows, number, seed), p.shape[1]) & BITS))
