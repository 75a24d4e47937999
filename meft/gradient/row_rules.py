"""Which operations on gradients keep the untouched rows zero, and their results on the touched ones.

Gradients stand here as `Touched`: `meft.gradient.row_gradient` turns its own into these and the results back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_bridge.torch_private import tree_leaves, tree_map

aten = torch.ops.aten

# Pointwise too, though torch does not tag them.
_POINTWISE = {
    aten.masked_fill_.Scalar,
    aten.masked_fill_.Tensor,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.where.Scalar,
    aten._to_copy.default,
    aten.absolute.default,
}


_SCALING = {aten.mul, aten.mul_, aten.div, aten.div_}


@dataclass(frozen=True, eq=False)
class Touched:
    """Rows and values of a gradient [r, d] that is zero elsewhere."""

    rows: Tensor
    values: Tensor
    shape: torch.Size

    def whole(self) -> Tensor:
        """[r, d]"""
        return self.values.new_zeros(self.shape).index_copy_(0, self.rows, self.values)

    def at(self, rows: Tensor) -> Tensor:
        """Values of rows that contain the touched ones, [n, d]; the same memory where they are the same."""
        if rows is self.rows:
            return self.values
        index = torch.searchsorted(rows, self.rows)
        return self.values.new_zeros(len(rows), *self.shape[1:]).index_copy_(0, index, self.values)


class BecomesDenseError(NotImplementedError):
    """A result would not be zero in untouched rows."""

    def __init__(self, func: Any) -> None:
        super().__init__(
            f"{func} would write into rows of a gradient of MEFT rows (RowGradient) that no token has used, and so "
            "make it dense: change .to_dense() and assign that to .grad if all rows shall be updated."
        )


def all_rows(touched: list[Touched]) -> Tensor:
    """The rows of several gradients, ascending."""
    first, *others = (t.rows for t in touched)
    return first if all(torch.equal(first, rows) for rows in others) else torch.cat([first, *others]).unique()


def _untouched(rows: Tensor, r: int) -> Tensor:
    left = torch.ones(r, dtype=torch.bool, device=rows.device)
    left[rows] = False
    return left.nonzero().flatten()


def is_pointwise(func: Any, leaves: list[Any], shape: torch.Size) -> bool:
    """Whether each value of the result depends on the values of its own place alone, and is of a table's shape."""
    if torch.Tag.pointwise not in func.tags and func not in _POINTWISE:
        return False
    shapes = [leaf.shape for leaf in leaves if isinstance(leaf, Tensor | Touched)]
    try:
        return torch.broadcast_shapes(*shapes) == shape
    except RuntimeError:
        return False  # torch's own error comes from the whole gradient


def by_rows(func: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor] | None:
    """A pointwise operation, out of place or in the place of its first argument, on the touched rows.

    Returns:
        rows and values; None where the result is no gradient (a mask).

    Raises:
        BecomesDenseError: zeros do not stay zero.
    """
    touched = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Touched)]
    shape, rows = touched[0].shape, all_rows(touched)
    plain = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    by_row = {id(t) for t in plain if t.ndim == len(shape) and t.shape[0] == shape[0] > 1}
    others = _untouched(rows, shape[0]) if by_row else rows.new_zeros(1)

    def zeros(leaf: Any) -> Any:
        if isinstance(leaf, Touched):
            return leaf.values.new_zeros(len(others), *shape[1:])
        return leaf[others] if id(leaf) in by_row else leaf

    def values(leaf: Any) -> Any:
        if isinstance(leaf, Touched):
            return leaf.at(rows)
        return leaf[rows] if id(leaf) in by_row else leaf

    untouched = func(*tree_map(zeros, args), **tree_map(zeros, kwargs))
    if not isinstance(untouched, Tensor) or not untouched.is_floating_point():
        return None
    # A factor that is not finite shows in the touched rows: scaling by such a norm is no error, as in place.
    scaled = func.overloadpacket in _SCALING and isinstance(args[0], Touched) and all(t.numel() == 1 for t in plain)
    if not (scaled and len(touched) == 1) and bool((untouched != 0).any()):
        raise BecomesDenseError(func)
    return rows, func(*tree_map(values, args), **tree_map(values, kwargs))


def rows_of_whole(func: Any, whole: Tensor, touched: list[Touched]) -> tuple[Tensor, Tensor]:
    """Rows and values of a whole gradient that an operation has made of some.

    Raises:
        BecomesDenseError: it is not zero in rows that none of them has touched.
    """
    rows = all_rows(touched)
    if bool((whole.index_select(0, _untouched(rows, len(whole))) != 0).any()):
        raise BecomesDenseError(func)
    return rows, whole.index_select(0, rows)
