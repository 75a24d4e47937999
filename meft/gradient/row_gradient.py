"""A gradient of a table [r, d] that stores only the rows that a backward pass has touched.

It is what autograd accumulates in `.grad` of keys and values. Everything that happens to a gradient between backward
and step works on it and treats the other rows as the zeros that they are: accumulation over backward passes,
`zero_grad`, clipping by norm or value (torch, accelerate), `GradScaler.unscale_`, and whatever else leaves zeros zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_bridge.torch_private import tree_map

from .operations import operate
from .part import PartOfGradient, plain
from .row_rules import rows_of_whole
from .scaling import overflow_watchers
from .stored_rows import CONSUMED, StoredRows, check_not_consumed

__all__ = ["CONSUMED", "RowGradient", "as_row_gradient", "overflow_watchers"]


class RowGradient(StoredRows):
    """A gradient of shape [r, d].

    An operation whose result is zero wherever the gradient is works on the touched rows and gives a `RowGradient`;
    reductions, masks and parts are those of the whole gradient; what would write into other rows is an error.

    Attributes:
        rows: int64 [n], the touched rows, ascending.
        row_values: [n, d], their gradients, at least in float32. While the gradient is being copied from a device,
            reading them waits for the copy.
        owner: id of the table's parameter.
        consumed: whether the rows are being updated with it already, so that it can be read but not changed.
    """

    def __setitem__(self, index: Any, value: Any) -> None:
        # Not left to torch, which would write into a view of some of its values.
        check_not_consumed(self)
        whole, touched = self.to_dense(), self.touched()
        value = tree_map(_whole, value)
        same = isinstance(value, Tensor) and value.dtype == self.dtype
        whole[tree_map(_whole, index)] = value.to(whole.dtype) if same else value
        self._stored = rows_of_whole("Assigning to some of its values", whole, [touched])

    def some(self, which: Tensor) -> RowGradient:
        """For an update: the gradient of some of the touched rows, bool [n]."""
        rows, values, factors = self.to_multiply()
        part = self._of((rows[which], values[which]), self)
        part._held.factors = factors
        return part

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return operate(func, args, kwargs or {})


def _whole(value: Any) -> Any:
    return value.to_dense() if isinstance(value, RowGradient) else plain(value)


def as_row_gradient(gradient: Tensor, like: Tensor | None = None) -> RowGradient:
    """A gradient as a `RowGradient`; of a plain tensor (a penalty's, for example) all rows are touched."""
    if isinstance(gradient, RowGradient):
        return gradient
    if isinstance(gradient, PartOfGradient):
        raise NotImplementedError(
            "What was made of a view or a stack of gradients of MEFT rows is the .grad of rows, which would touch all "
            "of them: make it of the gradients themselves, or of their .to_dense() if all rows shall be updated."
        )
    rows = torch.arange(len(gradient), device=gradient.device)
    return RowGradient(rows, gradient, gradient if like is None else like)
