"""Moments in codes of 8 bits: floating-point numbers with subnormals, in blocks of a row with a scale each.

The first moment has a sign, 4 bits of exponent and 3 of mantissa: codes as those of torch.float8_e4m3fn, up to 448. The
second is kept as its root, which has no sign, and 4 bits each; in units of the smallest code it goes up to 31 * 2^14.
What is smaller than the smallest code has that one, and not zero. The operations are those of meft's narrow_moments.h,
in their order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .moment_layout import BLOCK

_LEAST = 2.0**-100  # blocks without larger values are zero


class _Code(NamedTuple):
    """Attributes: mantissa: its bits. most: the largest value. unit: the value of the smallest code but zero."""

    mantissa: int
    most: float
    unit: float


_FIRST = _Code(3, 448.0, 2.0**-9)
_ROOT = _Code(4, 507904.0, 1.0)


def decode_first(codes: Tensor, scales: Tensor) -> Tensor:
    """First moments, float32 [n, d], of uint8 codes [n, d] and float32 scales [n, blocks]."""
    codes = codes.to(torch.int32)
    sizes = _decoded(codes & 0x7F, _FIRST)
    return torch.where(codes >= 0x80, -sizes, sizes) * _each(scales * _FIRST.unit, codes.shape[1])


def decode_root(codes: Tensor, scales: Tensor) -> Tensor:
    """Roots of second moments, as above."""
    return _decoded(codes.to(torch.int32), _ROOT) * _each(scales, codes.shape[1])


def encode_first(moments: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of float32 [n, d]; noise: int32 [n, d], 16 bits each."""
    codes, scales, finite = _encoded(moments.abs(), noise, _FIRST)
    return _where(finite, codes | ((moments.view(torch.int32) >> 24) & 0x80)), scales


def encode_root(roots: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of roots; what is not zero has no code of zero, by which a first moment would be divided."""
    codes, scales, finite = _encoded(roots, noise, _ROOT)
    return _where(finite, torch.maximum(codes, (roots > 0).to(torch.int32))), scales


def _each(of_blocks: Tensor, d: int) -> Tensor:
    """[n, d] of [n, blocks]."""
    return of_blocks.repeat_interleave(BLOCK, 1)[:, :d]


def _where(finite: Tensor, codes: Tensor) -> Tensor:
    return torch.where(_each(finite, codes.shape[1]), codes, 0).to(torch.uint8)


def _encoded(sizes: Tensor, noise: Tensor, code: _Code) -> tuple[Tensor, Tensor, Tensor]:
    """Codes without sign, int32 [n, d], scales and whether they are finite, [n, blocks]."""
    n, d = sizes.shape
    blocks = F.pad(sizes, (0, -d % BLOCK)).view(n, -1, BLOCK)
    largest = (blocks.view(torch.int32) & 0x7FFFFFFF).amax(2).view(torch.float32)  # of NaN too
    finite, there = largest.isfinite(), largest >= _LEAST
    zero = torch.zeros_like(largest)
    scales = torch.where(finite, torch.where(there, largest / code.most, zero), torch.nan)
    factor = torch.where(finite & there, (code.most / code.unit) / largest, zero)
    units = (sizes * _each(factor, d)).clamp(max=code.most / code.unit)
    normal, shift = 1 << code.mantissa, 23 - code.mantissa
    small = units < normal
    bits = torch.where(small, units + normal, units).view(torch.int32) + (noise << (shift - 16))
    codes = ((bits - ((127 + code.mantissa) << 23)) >> shift) + torch.where(small, 0, normal)
    return codes, scales, finite


def _decoded(codes: Tensor, code: _Code) -> Tensor:
    """In units of the smallest code."""
    normal, shift = 1 << code.mantissa, 23 - code.mantissa
    small = codes < normal
    bits = (torch.where(small, codes, codes - normal) << shift) + ((127 + code.mantissa) << 23)
    values = bits.to(torch.int32).view(torch.float32)
    return torch.where(small, values - normal, values)
