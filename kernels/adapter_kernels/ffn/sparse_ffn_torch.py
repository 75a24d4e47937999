"""The torch path of `sparse_ffn`: products with a sparse [T, U] matrix, with sums in float32 (float64 of float64).

Nothing of T U elements is made where torch has sparse products; elsewhere `sparse_products` uses dense ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .sparse_products import column_sums, entry_dots, line_sums


class _Picks:
    """The picks that are not none, as the pattern of a sparse [T, U] matrix in rows of tokens."""

    def __init__(self, position: Tensor, rows: int) -> None:
        self.live = (position >= 0) & (position < rows)
        self.rows = rows
        self.starts = torch.zeros(len(position) + 1, dtype=torch.int64, device=position.device)
        torch.cumsum(self.live.sum(1), 0, out=self.starts[1:])
        self.row = position[self.live].to(torch.int64)
        self.token = self.live.nonzero()[:, 0]

    def dots(self, a: Tensor, b: Tensor) -> Tensor:
        """a_t . b_u of each pick."""
        return entry_dots(self.starts, self.row, self.token, a, b)

    def by_token(self, weights: Tensor, b: Tensor) -> Tensor:
        """The sum of weight times b_u over each token's picks."""
        return line_sums(self.starts, self.row, self.token, weights, b)

    def by_row(self, weights: Tensor, a: Tensor) -> Tensor:
        """The sum of weight times a_t over each row's picks."""
        return column_sums(self.row, self.token, weights, a, self.rows)


def _wide(tensor: Tensor) -> Tensor:
    """In the dtype of sums; in one piece, as the sparse products take it."""
    return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32).contiguous()


def forward(
    x: Tensor, keys: Tensor, values: Tensor, position: Tensor, factors: Tensor | None, base: Tensor | None
) -> Tensor:
    """y, [T, d] of x's dtype."""
    picks = _Picks(position, len(keys))
    scores = picks.dots(_wide(x), _wide(keys))
    if factors is not None:
        scores = scores * factors[picks.live].to(scores.dtype)
    y = picks.by_token(scores.where(scores > 0, 0), _wide(values))
    return (y.add_(base) if base is not None else y).to(x.dtype)


def backward(
    g: Tensor, x: Tensor, keys: Tensor, values: Tensor, position: Tensor, factors: Tensor | None, needs: list[bool],
    row_gradients: torch.dtype,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dx, dkeys, dvalues (both in the dtype `row_gradients`) and dfactors; None for what is not needed."""
    picks = _Picks(position, len(keys))
    wide_x, wide_g, wide_keys = _wide(x), _wide(g), _wide(keys)
    dots = picks.dots(wide_x, wide_keys)
    factor = factors[picks.live].to(dots.dtype) if factors is not None else None
    scores = dots * factor if factor is not None else dots
    dvalues = picks.by_row(scores.where(scores > 0, 0), wide_g).to(row_gradients) if needs[2] else None
    if not (needs[0] or needs[1] or needs[3]):
        return None, None, dvalues, None
    ds = picks.dots(wide_g, _wide(values)).where(scores > 0, 0)
    by_key = ds * factor if factor is not None else ds
    dx = picks.by_token(by_key, wide_keys).to(x.dtype) if needs[0] else None
    dkeys = picks.by_row(by_key, wide_x).to(row_gradients) if needs[1] else None
    dfactors = None
    if factors is not None and needs[3]:
        dfactors = torch.zeros_like(factors, memory_format=torch.contiguous_format)
        dfactors[picks.live] = (ds * dots).to(factors.dtype)
    return dx, dkeys, dvalues, dfactors
