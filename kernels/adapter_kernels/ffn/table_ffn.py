"""The FFN of the picked neurons over whole tables in host memory: `sparse_ffn` without gathered rows.

The formula and its gradient are those of `sparse_ffn`; rows are read where they are, and scores are not computed
again: x . key of each pick is known from `expert_topk`. Gradients are those of the distinct rows alone. On the CPU
only, where there is no kernel: these functions are no operations that `torch.compile` would see.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime import dispatch
from . import sparse_ffn_torch

__all__ = ["table_ffn", "table_ffn_backward"]


def table_ffn(
    x: Tensor, keys: Tensor, values: Tensor, ids: Tensor, dots: Tensor, factors: Tensor | None = None
) -> Tensor:
    """The sum of ReLU(factor * dot) * value over each token's picks; without a graph.

    Args:
        x: [T, d], float32 or float64.
        keys, values: tables [r, d] of x's dtype.
        ids: int32 [T, K], the rows of a token's picks, distinct; -1 is none.
        dots: x . key of each pick, [T, K] of x's dtype.
        factors: the router's logit of each pick's expert, [T, K]; None: no factor.

    Returns:
        [T, d] of x's dtype.

    Raises:
        ValueError: wrong dtype or shape.
    """
    _check(x, keys, values, ids, dots)
    return sparse_ffn_torch.forward(x, keys, values, ids, factors, None, dots)


def table_ffn_backward(
    g: Tensor, x: Tensor, keys: Tensor, values: Tensor, ids: Tensor, dots: Tensor, factors: Tensor | None,
    inverse: Tensor, rows: int, *, needs: Sequence[bool] = (True, True, True, True),
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of `table_ffn`.

    Args:
        g: dL/dy, [T, d] of x's dtype.
        x, keys, values, ids, dots, factors: as in `table_ffn`.
        inverse: int32 [T, K], each pick's place among the distinct rows, as `row_union` gives it.
        rows: how many distinct ones there are, u.
        needs: which of the four are wanted.

    Returns:
        dx [T, d], dkeys and dvalues [u, d], dfactors [T, K]; None for what is not wanted.

    Raises:
        ValueError: wrong dtype or shape.
    """
    _check(x, keys, values, ids, dots)
    return sparse_ffn_torch.backward(g, x, keys, values, ids, factors, list(needs), x.dtype, dots, (inverse, rows))


def _check(x: Tensor, keys: Tensor, values: Tensor, ids: Tensor, dots: Tensor) -> None:
    dispatch.require_matrix(x, "x", (torch.float32, torch.float64))
    for table, name in ((keys, "keys"), (values, "values")):
        dispatch.require_matrix(table, name, (x.dtype,), columns=x.shape[1])
    if ids.shape != dots.shape or len(ids) != len(x):
        shapes = f"{tuple(ids.shape)}, dots {tuple(dots.shape)}, {len(x)} tokens"
        dispatch.refuse("ids", f"[T, K] like dots is needed, not {shapes}")
