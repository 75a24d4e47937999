"""The FFN of the picked neurons over whole tables in host memory: `sparse_ffn` without gathered rows.

The formula and its gradient are those of `sparse_ffn`; rows are read where they are, and what `expert_topk` has
computed is not computed again: the scores, and x . key of each pick. Gradients are those of the distinct rows alone.
On the CPU only, where there is no kernel: these functions are no operations that `torch.compile` would see.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime import dispatch
from . import sparse_ffn_torch

__all__ = ["table_ffn", "table_ffn_backward"]

_DTYPES = (torch.float32, torch.float64)


def table_ffn(values: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
    """The sum of score * value over each token's picks; without a graph.

    Args:
        values: a table [r, d], float32 or float64.
        ids: int32 [T, K], the rows of a token's picks, distinct; -1 is none.
        scores: of each pick, [T, K] of values' dtype, 0 where there is none, as `expert_topk` gives them.

    Returns:
        [T, d] of values' dtype.

    Raises:
        ValueError: wrong dtype or shape.
    """
    if values.dim() != 2 or values.dtype not in _DTYPES or scores.dim() != 2 or scores.dtype != values.dtype:
        dispatch.require_matrix(values, "values", _DTYPES)
        dispatch.require_matrix(scores, "scores", (values.dtype,))
    _check_picks(ids, scores, "scores")
    return sparse_ffn_torch.weighted_sums(values, ids, scores)


def table_ffn_backward(
    g: Tensor, x: Tensor, keys: Tensor, values: Tensor, ids: Tensor, dots: Tensor, factors: Tensor | None,
    inverse: Tensor, rows: int, *, needs: Sequence[bool] = (True, True, True, True),
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of `table_ffn`.

    Args:
        g: dL/dy, [T, d] of x's dtype.
        x: [T, d], float32 or float64.
        keys, values: tables [r, d] of x's dtype.
        ids: as in `table_ffn`.
        dots: x . key of each pick, [T, K] of x's dtype.
        factors: the router's logit of each pick's expert, [T, K]; None: no factor.
        inverse: int32 [T, K], each pick's place among the distinct rows, as `row_union` gives it.
        rows: how many distinct ones there are, u.
        needs: which of the four are wanted.

    Returns:
        dx [T, d], dkeys and dvalues [u, d], dfactors [T, K]; None for what is not wanted.

    Raises:
        ValueError: wrong dtype or shape.
    """
    dispatch.require_matrix(x, "x", _DTYPES)
    for table, name in ((keys, "keys"), (values, "values")):
        dispatch.require_matrix(table, name, (x.dtype,), columns=x.shape[1])
    _check_picks(ids, dots, "dots")
    if len(ids) != len(x):
        dispatch.refuse("ids", f"{len(ids)} rows for {len(x)} tokens")
    return sparse_ffn_torch.backward(g, x, keys, values, ids, factors, list(needs), x.dtype, dots, (inverse, rows))


def _check_picks(ids: Tensor, of_picks: Tensor, name: str) -> None:
    if ids.shape != of_picks.shape:
        dispatch.refuse("ids", f"{tuple(ids.shape)}, but {name} {tuple(of_picks.shape)}")
