"""A gradient of a table [r, d] that stores only the rows that a backward pass has touched.

It is what autograd accumulates in `.grad` of keys and values. Everything that happens to a gradient between backward
and step works on it and treats the other rows as the zeros that they are: accumulation over backward passes,
`zero_grad`, clipping by norm or value (torch, accelerate), `GradScaler.unscale_`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

aten = torch.ops.aten


class RowGradient(torch.Tensor):
    """A gradient of shape [r, d].

    Attributes:
        rows: int64 [n], the touched rows, ascending.
        row_values: [n, d], their gradients, at least in float32.
        owner: id of the table's parameter.
    """

    rows: Tensor
    row_values: Tensor
    owner: int

    @staticmethod
    def __new__(cls, rows: Tensor, row_values: Tensor, like: Tensor) -> RowGradient:
        """Args: like: the table; shape, dtype and device are taken from it."""
        self = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, dtype=like.dtype, device=like.device, requires_grad=False
        )
        self.rows, self.row_values = rows, row_values
        self.owner = like.owner if isinstance(like, RowGradient) else id(like)
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"RowGradient(shape={list(self.shape)}, rows={len(self.rows)}, dtype={self.dtype})"

    def to_dense(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """The whole gradient, [r, d], zero in the other rows."""
        whole = self.row_values.new_zeros(self.shape)
        return whole.index_copy_(0, self.rows, self.row_values)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func in _HANDLERS:
            return _HANDLERS[func](func, *args, **kwargs)
        if func._schema.is_mutable:
            raise NotImplementedError(
                f"{func} cannot change a gradient of MEFT rows (RowGradient): let meft.RowAdamW or the optimizer hook "
                "use it, or take .to_dense()."
            )
        # Somebody looks at the gradient (a log, a check): as if it were whole.
        return func(*tree_map(_whole, args), **tree_map(_whole, kwargs))


def _whole(value: Any) -> Any:
    return value.to_dense() if isinstance(value, RowGradient) else value


def as_row_gradient(gradient: Tensor, like: Tensor | None = None) -> RowGradient:
    """A gradient that somebody else has made (a plain tensor, of a penalty for one): all rows are touched."""
    if isinstance(gradient, RowGradient):
        return gradient
    rows = torch.arange(len(gradient), device=gradient.device)
    return RowGradient(rows, gradient, gradient if like is None else like)


def _stored(tensor: Any) -> Any:
    return tensor.row_values if isinstance(tensor, RowGradient) else tensor


def _with(gradient: RowGradient, rows: Tensor, values: Tensor) -> RowGradient:
    return RowGradient(rows, values, gradient)


def _merged(a: RowGradient, b: RowGradient) -> tuple[Tensor, Tensor]:
    if torch.equal(a.rows, b.rows):
        return a.rows, a.row_values + b.row_values
    rows, place = torch.cat([a.rows, b.rows]).unique(return_inverse=True)
    values = a.row_values.new_zeros(len(rows), *a.row_values.shape[1:])
    values.index_copy_(0, place[: len(a.rows)], a.row_values)
    values.index_add_(0, place[len(a.rows) :], b.row_values)
    return rows, values


def _add(func: Any, a: Any, b: Any, *, alpha: float = 1) -> Any:
    if func is aten.add_.Tensor and not isinstance(a, RowGradient):  # a plain tensor stays one
        return a.index_add_(0, b.rows, b.row_values.to(a.dtype), alpha=alpha)
    a, b = (as_row_gradient(g, a) for g in (a, b))
    if alpha != 1:
        b = _with(b, b.rows, b.row_values * alpha)
    rows, values = _merged(a, b)
    if func is aten.add.Tensor:
        return _with(a, rows, values)
    a.rows, a.row_values = rows, values
    return a


def _in_place(func: Any, a: RowGradient, *args: Any, **kwargs: Any) -> RowGradient:
    """Operations that leave zeros zero."""
    func(a.row_values, *map(_stored, args), **kwargs)
    return a


def _foreach_in_place(func: Any, gradients: list[Tensor], *args: Any, **kwargs: Any) -> None:
    func([_stored(g) for g in gradients], *args, **kwargs)


class OverflowWatcher(Protocol):
    """Who wants to hear of steps that a GradScaler will skip."""

    def note_overflow(self, owners: set[int], found_inf: Tensor) -> None:
        """`found_inf` is set, and gradients of these tables were among the unscaled ones."""


overflow_watchers: weakref.WeakSet[Any] = weakref.WeakSet()


def _unscale(func: Any, gradients: list[Tensor], found_inf: Tensor, inverse_scale: Tensor) -> None:
    _foreach_in_place(func, gradients, found_inf, inverse_scale)
    owners = {g.owner for g in gradients if isinstance(g, RowGradient)}
    if owners and bool(found_inf > 0):
        for watcher in list(overflow_watchers):
            watcher.note_overflow(owners, found_inf)


def _clamp(
    func: Any,
    a: RowGradient,
    min: float | None = None,
    max: float | None = None,  # torch's names
) -> RowGradient:
    _check_bounds(min, max)
    func(a.row_values, min, max)
    return a


def _foreach_clamp(func: Any, gradients: list[Tensor], bound: float) -> None:
    if any(isinstance(g, RowGradient) for g in gradients):
        _check_bounds(*((bound, None) if func is aten._foreach_clamp_min_.Scalar else (None, bound)))
    _foreach_in_place(func, gradients, bound)


def _check_bounds(low: float | None, high: float | None) -> None:
    if (low is not None and low > 0) or (high is not None and high < 0):
        raise NotImplementedError(
            f"Clamping a gradient of MEFT rows to [{low}, {high}] is an interval without 0: it would become dense."
        )


def _norm(func: Any, a: RowGradient, *args: Any, **kwargs: Any) -> Tensor:
    if not a.row_values.numel():
        return a.row_values.new_zeros(())  # the inf-norm of nothing raises
    return func(a.row_values, *args, **kwargs)


def _foreach_norm(func: Any, gradients: list[Tensor], ord: float = 2, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [aten.linalg_vector_norm.default(g, ord, dtype=dtype) for g in gradients]


def _nothing(a: RowGradient) -> tuple[Tensor, Tensor]:
    """No rows; not a slice, which would hold on to the memory of all."""
    return a.rows.new_empty(0), a.row_values.new_empty(0, *a.row_values.shape[1:])


def _zero(func: Any, a: RowGradient) -> RowGradient:
    a.rows, a.row_values = _nothing(a)
    return a


def _foreach_zero(func: Any, gradients: list[Tensor]) -> None:
    for gradient in gradients:
        gradient.zero_()


def _detach(func: Any, a: RowGradient) -> RowGradient:
    return _with(a, a.rows, a.row_values)


def _copied(func: Any, a: RowGradient, **kwargs: Any) -> RowGradient:
    return _with(a, a.rows, a.row_values.clone())


def _empty(func: Any, a: RowGradient, *args: Any, **kwargs: Any) -> RowGradient:
    return _with(a, *_nothing(a))


def _copy_from(func: Any, a: RowGradient, b: RowGradient, non_blocking: bool = False) -> RowGradient:
    a.rows, a.row_values = b.rows, b.row_values.clone()
    return a


_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: _add,
    aten.add_.Tensor: _add,
    aten.mul_.Tensor: _in_place,
    aten.mul_.Scalar: _in_place,
    aten.div_.Tensor: _in_place,
    aten.div_.Scalar: _in_place,
    aten.neg_.default: _in_place,
    aten.clamp_.default: _clamp,
    aten._foreach_mul_.Tensor: _foreach_in_place,
    aten._foreach_mul_.Scalar: _foreach_in_place,
    aten._foreach_div_.Tensor: _foreach_in_place,
    aten._foreach_div_.Scalar: _foreach_in_place,
    aten._foreach_clamp_min_.Scalar: _foreach_clamp,
    aten._foreach_clamp_max_.Scalar: _foreach_clamp,
    aten._amp_foreach_non_finite_check_and_unscale_.default: _unscale,
    aten.linalg_vector_norm.default: _norm,
    aten._foreach_norm.Scalar: _foreach_norm,
    aten.zero_.default: _zero,
    aten._foreach_zero_.default: _foreach_zero,
    aten.detach.default: _detach,
    aten.clone.default: _copied,
    aten.new_empty_strided.default: _empty,
    aten.copy_.default: _copy_from,
}
