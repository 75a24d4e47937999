"""The torch paths of `sparse_ffn` and `table_ffn`: sums are in float32 (float64 of float64).

Products with a sparse [T, U] matrix; nothing of T U elements is made where torch has sparse products, elsewhere
`sparse_products` uses dense ones. In a forward pass of few tokens, plain products of all gathered rows are faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import sparse_ffn_plain
from .sparse_products import ByColumn, entry_dots, line_sums

_FEW = 8  # tokens for which a sparse matrix is not made: that would take longer than the products


class _Picks:
    """The picks that are not none, as the pattern of a sparse [T, U] matrix in rows of tokens."""

    def __init__(self, position: Tensor, rows: int) -> None:
        self.live = (position >= 0) & (position < rows)
        self.starts = torch.zeros(len(position) + 1, dtype=torch.int64, device=position.device)
        torch.cumsum(self.live.sum(1), 0, out=self.starts[1:])
        pick = self.live.flatten().nonzero().flatten()
        self.row = position.flatten().index_select(0, pick).to(torch.int64)
        self.token = torch.div(pick, max(1, position.shape[1]), rounding_mode="floor")
        self.pick = pick

    def column(self, of_picks: Tensor, dtype: torch.dtype) -> Tensor:
        """What is known of each pick, [T, K], as a list."""
        return of_picks.flatten().index_select(0, self.pick).to(dtype)

    def dots(self, a: Tensor, b: Tensor) -> Tensor:
        """a_t . b_u of each pick."""
        return entry_dots(self.starts, self.row, self.token, a, b)

    def by_token(self, weights: Tensor, b: Tensor) -> Tensor:
        """The sum of weight times b_u over each token's picks."""
        return line_sums(self.starts, self.row, self.token, weights, b)


def wide(tensor: Tensor) -> Tensor:
    """In the dtype of sums; in one piece, as the sparse products take it."""
    if tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.to(torch.float32)
    return tensor.contiguous()


def forward(
    x: Tensor, keys: Tensor, values: Tensor, position: Tensor, factors: Tensor | None, base: Tensor | None
) -> Tensor:
    """y, [T, d] of x's dtype."""
    if x.shape[0] <= _FEW and keys.shape[0] and position.shape[1]:
        y = sparse_ffn_plain.forward(wide(x), wide(keys), wide(values), position, factors, None)
    else:
        picks = _Picks(position, len(keys))
        scores = picks.dots(wide(x), wide(keys))
        if factors is not None:
            scores = scores * picks.column(factors, scores.dtype)
        y = picks.by_token(scores.where(scores > 0, 0), wide(values))
    return (y.add_(base) if base is not None else y).to(x.dtype)


def weighted_sums(values: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
    """The sum of score times value over each token's picks, [T, d]; the score of what is none (-1) is 0."""
    if ids.shape[0] <= _FEW and values.shape[0] and ids.shape[1]:
        return torch.bmm(scores.unsqueeze(1), torch.embedding(values, ids.clamp_min(0))).squeeze(1)
    picks = _Picks(ids, len(values))
    return picks.by_token(picks.column(scores, scores.dtype), values.contiguous())


def backward(
    g: Tensor, x: Tensor, keys: Tensor, values: Tensor, position: Tensor, factors: Tensor | None, needs: list[bool],
    row_gradients: torch.dtype, dots: Tensor | None = None, within: tuple[Tensor, int] | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dx, dkeys, dvalues (both in the dtype `row_gradients`) and dfactors; None for what is not needed.

    Args:
        dots: as in `forward`.
        within: int32 [T, K], each pick's place among the rows that have gradients, and their number; None: `position`.
    """
    picks = _Picks(position, len(keys))
    wide_x, wide_g, wide_keys = wide(x), wide(g), wide(keys)
    known = picks.column(dots, dots.dtype) if dots is not None else picks.dots(wide_x, wide_keys)
    factor = picks.column(factors, known.dtype) if factors is not None else None
    scores = known * factor if factor is not None else known
    row = picks.row if within is None else picks.column(within[0], torch.int64)
    by_row = ByColumn(row, picks.token, len(keys) if within is None else within[1])
    dvalues = by_row.sums(scores.where(scores > 0, 0), wide_g).to(row_gradients) if needs[2] else None
    if not (needs[0] or needs[1] or needs[3]):
        return None, None, dvalues, None
    ds = picks.dots(wide_g, wide(values)).where(scores > 0, 0)
    by_key = ds * factor if factor is not None else ds
    dx = picks.by_token(by_key, wide_keys).to(x.dtype) if needs[0] else None
    dkeys = by_row.sums(by_key, wide_x).to(row_gradients) if needs[1] else None
    dfactors = None
    if factors is not None and needs[3]:
        dfactors = torch.zeros_like(factors, memory_format=torch.contiguous_format)
        dfactors.view(-1).index_copy_(0, picks.pick, (ds * known).to(factors.dtype))
    return dx, dkeys, dvalues, dfactors
