"""A gradient of a table [r, d] that stores only the rows that a backward pass has touched.

It is what autograd accumulates in `.grad` of keys and values. Everything that happens to a gradient between backward
and step works on it and treats the other rows as the zeros that they are: accumulation over backward passes,
`zero_grad`, clipping by norm or value (torch, accelerate), `GradScaler.unscale_`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .row_sums import Pending, Stored, merged

aten = torch.ops.aten


class RowGradient(torch.Tensor):
    """A gradient of shape [r, d].

    Attributes:
        rows: int64 [n], the touched rows, ascending.
        row_values: [n, d], their gradients, at least in float32. Of a gradient that is on its way from a device,
            whoever reads these waits for its arrival.
        owner: id of the table's parameter.
        spent: whether the rows are being updated with it already, so that it can be read but not changed.
    """

    owner: int
    spent: bool
    _stored: Stored

    @staticmethod
    def __new__(cls, rows: Tensor, row_values: Tensor, like: Tensor) -> RowGradient:
        """Args: like: the table; shape, dtype and device are taken from it."""
        return cls._of((rows, row_values), like)

    @classmethod
    def arriving(cls, pending: Pending, like: Tensor) -> RowGradient:
        """A gradient whose rows and values come later."""
        return cls._of(pending, like)

    @classmethod
    def _of(cls, stored: Stored, like: Tensor) -> RowGradient:
        self = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, dtype=like.dtype, device=like.device, requires_grad=False
        )
        self._stored = stored
        self.owner = like.owner if isinstance(like, RowGradient) else id(like)
        self.spent = isinstance(like, RowGradient) and like.spent
        return self

    @property
    def rows(self) -> Tensor:
        return self.stored()[0]

    @property
    def row_values(self) -> Tensor:
        return self.stored()[1]

    def stored(self) -> tuple[Tensor, Tensor]:
        """Rows and values."""
        if isinstance(self._stored, Pending):
            self._stored = self._stored.result()
        return self._stored

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        rows = "arriving" if isinstance(self._stored, Pending) else len(self.rows)
        return f"RowGradient(shape={list(self.shape)}, rows={rows}, dtype={self.dtype})"

    def to_dense(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """The whole gradient, [r, d], zero in the other rows."""
        whole = self.row_values.new_zeros(self.shape)
        return whole.index_copy_(0, self.rows, self.row_values)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func in _HANDLERS:
            if func in _CHANGES and _spent(args[0]):
                if func not in _PRODUCTS or not _changes_nothing(args[1]):
                    raise RuntimeError(SPENT)
                if not isinstance(args[0], list | tuple):
                    return args[0]
                args = ([g for g in args[0] if not _spent(g)], *args[1:])
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


def _add(func: Any, a: Any, b: Any, *, alpha: float = 1) -> Any:
    if func is aten.add_.Tensor and not isinstance(a, RowGradient):  # a plain tensor stays one
        return a.index_add_(0, b.rows, b.row_values.to(a.dtype), alpha=alpha)
    a, b = (as_row_gradient(g, a) for g in (a, b))
    if alpha != 1:
        b = _with(b, b.rows, b.row_values * alpha)
    if not isinstance(a._stored, Pending) and not len(a.rows):  # what `zero_grad(set_to_none=False)` leaves
        a.spent = b.spent
    elif a.spent or b.spent:
        raise RuntimeError(SPENT)
    stored = merged(a._stored, b._stored, len(a), in_place=func is aten.add_.Tensor)
    if func is aten.add.Tensor:
        return RowGradient._of(stored, a)
    a._stored = stored
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
    waits = isinstance(a._stored, Pending)
    dtype = torch.promote_types(a.dtype, torch.float32) if waits else a.row_values.dtype
    none = torch.empty(0, *a.shape[1:], dtype=dtype, device=a.device)
    return torch.empty(0, dtype=torch.int64, device=a.device), none


def _zero(func: Any, a: RowGradient) -> RowGradient:
    a._stored, a.spent = _nothing(a), False
    return a


def _foreach_zero(func: Any, gradients: list[Tensor]) -> None:
    for gradient in gradients:
        gradient.zero_()


def _detach(func: Any, a: RowGradient) -> RowGradient:
    return RowGradient._of(a._stored, a)


def _copied(func: Any, a: RowGradient, **kwargs: Any) -> RowGradient:
    return _with(a, a.rows, a.row_values.clone())


def _empty(func: Any, a: RowGradient, *args: Any, **kwargs: Any) -> RowGradient:
    return _with(a, *_nothing(a))


def _copy_from(func: Any, a: RowGradient, b: RowGradient, non_blocking: bool = False) -> RowGradient:
    # What is on its way belongs to nobody else: autograd copies it only because the copy is a tensor subclass.
    a._stored = b._stored if isinstance(b._stored, Pending) else (b.rows, b.row_values.clone())
    a.spent = b.spent
    return a


SPENT = (
    "A gradient of MEFT rows that were updated within the backward pass (row_optimizer has in_backward=True) cannot be "
    "clipped, scaled or added to any more: train without clipping (Trainer: max_grad_norm=0) and GradScaler, with one "
    "forward pass in a backward pass, accumulate by accelerate (a Trainer does), or set in_backward=False."
)


def _changes_nothing(factor: Any) -> bool:
    """By 1, or by nan where the norm is not finite: what comes of a Trainer that only asks for the norm."""
    if isinstance(factor, Tensor) and factor.numel() != 1:
        return False
    return float(factor) == 1.0 or math.isnan(float(factor))


def _spent(gradients: Any) -> bool:
    """Whether a gradient, or one of several, is spent."""
    some = gradients if isinstance(gradients, list | tuple) else [gradients]
    return any(isinstance(g, RowGradient) and g.spent for g in some)


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

# What changes a gradient otherwise than by zeroing or replacing it.
_CHANGES = {func for func, handler in _HANDLERS.items() if handler in (_in_place, _clamp, _foreach_in_place)} | {
    aten._foreach_clamp_min_.Scalar,
    aten._foreach_clamp_max_.Scalar,
    aten._amp_foreach_non_finite_check_and_unscale_.default,
}
_PRODUCTS = {aten.mul_.Tensor, aten.mul_.Scalar, aten._foreach_mul_.Tensor, aten._foreach_mul_.Scalar}
