"""Operations on gradients of rows that have a way of their own: sums, scaling, clipping, copies."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from peft_bridge.torch_private import ENGINE_CODE

from ..transport.transfer import wait_for_copies
from .accumulator import Pending, merged
from .rules import by_rule
from .stored_rows import SPENT, StoredRows

aten = torch.ops.aten


def _values(tensor: Any) -> Any:
    """The touched values, for our own reading and writing."""
    return tensor.stored()[1] if isinstance(tensor, StoredRows) else tensor


def _with(gradient: StoredRows, rows: Tensor, values: Tensor) -> StoredRows:
    return type(gradient)(rows, values, gradient)


def _by_autograd() -> bool:
    """Whether autograd itself has called this operation, and no function of somebody's."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and str(frame.f_globals.get("__name__")).startswith("meft."):
        frame = frame.f_back
    return frame is None or frame.f_code is ENGINE_CODE


def _add(func: Any, a: Any, b: Any, *, alpha: float = 1) -> Any:
    own = a if isinstance(a, StoredRows) else b
    if not (isinstance(a, StoredRows) and isinstance(b, StoredRows)):
        other = b if own is a else a
        if not isinstance(other, Tensor) or other.shape != own.shape:
            return NotImplemented
        if func is aten.add_.Tensor and own is b:  # a plain tensor stays one
            return a.index_add_(0, b.rows, _values(b).to(a.dtype), alpha=alpha)
        if not _by_autograd():
            return NotImplemented
        # A gradient of all rows, of a penalty for one, comes to that of some: all rows are touched.
        whole = _with(own, torch.arange(len(other), device=other.device), other)
        a, b = (own, whole) if own is a else (whole, own)
    if alpha != 1:
        b = _with(b, b.rows, _values(b) * alpha)
    in_place = func is aten.add_.Tensor
    if not isinstance(a._stored, Pending) and not len(a.rows):  # what `zero_grad(set_to_none=False)` leaves
        a.spent = b.spent
        if in_place and isinstance(b._stored, Pending):
            a.take_over(b)
            return a
    elif a.spent or b.spent:
        raise RuntimeError(SPENT)
    for each in (a, b):
        each.multiply_now()
    total = a if in_place else a._of(a._stored, a)
    total.become_sum(merged(a._stored, b._stored, len(a), in_place=in_place), a if in_place else None)
    return total


def _in_place(func: Any, a: StoredRows, *args: Any, **kwargs: Any) -> StoredRows:
    """Operations that leave zeros zero."""
    if any(isinstance(arg, Tensor) and (isinstance(arg, StoredRows) or arg.numel() != 1) for arg in (a, *args)[1:]):
        return NotImplemented
    func(_values(a), *args, **kwargs)
    return a


def _foreach_in_place(func: Any, gradients: list[Tensor], *args: Any, **kwargs: Any) -> None:
    func([_values(g) for g in gradients], *args, **kwargs)


def _is_number(factor: Any) -> bool:
    """Whether it is a real number that can be looked at without waiting for a device."""
    if isinstance(factor, Tensor):
        return type(factor) is Tensor and not factor.ndim and factor.is_cpu and not factor.is_complex()
    return isinstance(factor, int | float)


def _still_to_scale(func: Any, gradients: list[Any], factor: Any) -> list[Any]:
    """Without those that scaling by 1 leaves as they are, and those that are multiplied when they are read next."""
    if not _is_number(factor):
        return gradients
    if float(factor) == 1.0:
        return [g for g in gradients if not (isinstance(g, StoredRows) and g.is_cpu)]
    if func not in _PRODUCTS:
        return gradients
    return [g for g in gradients if not (isinstance(g, StoredRows) and g.multiply_later(factor))]


class OverflowWatcher(Protocol):
    """Who wants to hear of steps that a GradScaler will skip."""

    def note_overflow(self, owners: set[int], found_inf: Tensor) -> None:
        """`found_inf` is set, and gradients of these tables were among the unscaled ones."""


overflow_watchers: weakref.WeakSet[Any] = weakref.WeakSet()


def _unscale(func: Any, gradients: list[Tensor], found_inf: Tensor, inverse_scale: Tensor) -> None:
    if found_inf.is_cpu:
        # GradScaler brings both from its device without waiting: late, the flag would overwrite what is set here.
        wait_for_copies([found_inf, inverse_scale])
    left = [g for g in gradients if not _unscaled(g, inverse_scale)]
    for gradient in left:
        if isinstance(gradient, StoredRows):
            gradient.forget()
    if left:
        _foreach_in_place(func, left, found_inf, inverse_scale)
    owners = {g.owner for g in gradients if isinstance(g, StoredRows)}
    if owners and bool(found_inf > 0):
        for watcher in list(overflow_watchers):
            watcher.note_overflow(owners, found_inf)


def _unscaled(gradient: Any, inverse_scale: Tensor) -> bool:
    """Whether a gradient is known to be finite and unscaled now, without a look at its values."""
    if not isinstance(gradient, StoredRows) or not inverse_scale.is_cpu:
        return False
    known = gradient.squares()
    if known is None or not math.isfinite(known):
        return False
    return float(inverse_scale) == 1.0 or gradient.multiply_later(inverse_scale.reshape(()))


def _clamp(
    func: Any,
    a: StoredRows,
    min: float | None = None,
    max: float | None = None,  # torch's names
) -> StoredRows:
    _check_bounds(min, max)
    func(_values(a), min, max)
    return a


def _foreach_clamp(func: Any, gradients: list[Tensor], bound: float) -> None:
    if any(isinstance(g, StoredRows) for g in gradients):
        _check_bounds(*((bound, None) if func is aten._foreach_clamp_min_.Scalar else (None, bound)))
    _foreach_in_place(func, gradients, bound)


def _check_bounds(low: float | None, high: float | None) -> None:
    if (low is not None and low > 0) or (high is not None and high < 0):
        raise NotImplementedError(
            f"Clamping a gradient of MEFT rows to [{low}, {high}] is an interval without 0: it would become dense."
        )


def _norm(func: Any, a: StoredRows, ord: float = 2, *args: Any, **kwargs: Any) -> Tensor:
    if any(arg not in (None, False) for arg in args) or kwargs.get("dim") is not None or ord < 0:
        return NotImplemented
    known = a.squares() if ord == 2 and not kwargs.keys() - {"dtype"} else None
    if known is not None:
        return torch.tensor(math.sqrt(known), dtype=kwargs.get("dtype") or torch.float32, device="cpu")
    values = _values(a)
    if not values.numel():
        return values.new_zeros(())  # the inf-norm of nothing raises
    return func(values, ord, *args, **kwargs)


def _foreach_norm(func: Any, gradients: list[Tensor], ord: float = 2, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [aten.linalg_vector_norm.default(g, ord, dtype=dtype) for g in gradients]


def _nothing(a: StoredRows) -> tuple[Tensor, Tensor]:
    """No rows; not a slice, which would hold on to the memory of all."""
    waits = isinstance(a._stored, Pending)
    dtype = torch.promote_types(a.dtype, torch.float32) if waits else _values(a).dtype
    none = torch.empty(0, *a.shape[1:], dtype=dtype, device=a.device)
    return torch.empty(0, dtype=torch.int64, device=a.device), none


def _zero(func: Any, a: StoredRows) -> StoredRows:
    a._stored, a.spent = _nothing(a), False
    return a


def _foreach_zero(func: Any, gradients: list[Tensor]) -> None:
    for gradient in gradients:
        gradient.zero_()


def _detach(func: Any, a: StoredRows) -> StoredRows:
    alias = a._of(a._stored, a)
    alias._held = a._held
    return alias


def _seen_whole(func: Any, a: StoredRows, *args: Any) -> StoredRows:
    """A view of all of it."""
    if func is aten.slice.Tensor:
        given: list[Any] = [*args, *[0, None, None, 1][len(args) :]]
        dim, start, end, step = given
        same = start in (None, 0) and (end is None or end >= a.shape[dim]) and step == 1
    else:
        size = list(args[0]) if args else list(a.shape)
        same = len(size) == a.ndim and all(new in (-1, old) for new, old in zip(size, a.shape, strict=True))
    return _detach(func, a) if same else NotImplemented


def _copied(func: Any, a: StoredRows, **kwargs: Any) -> StoredRows:
    return _with(a, a.rows, _values(a).clone())


def _empty(func: Any, a: StoredRows, size: Any, *args: Any, **kwargs: Any) -> StoredRows:
    if list(size) != list(a.shape):
        return NotImplemented
    return _with(a, *_nothing(a))


def _copy_from(func: Any, a: Any, b: Any, non_blocking: bool = False) -> Any:
    if not isinstance(a, StoredRows):
        return a.copy_(b.to_dense())
    if not isinstance(b, StoredRows):
        return NotImplemented
    # What is on its way belongs to nobody else: autograd copies it only because the copy is a tensor subclass.
    if isinstance(b._stored, Pending):
        a.take_over(b)
    else:
        a._stored = b.rows, _values(b).clone()
    a.spent = b.spent
    return a


def _changes_nothing(factor: Any) -> bool:
    """By 1, or by nan where the norm is not finite: what comes of a Trainer that only asks for the norm."""
    if isinstance(factor, Tensor) and factor.numel() != 1:
        return False
    return float(factor) == 1.0 or math.isnan(float(factor))


def _spent(gradients: Any) -> bool:
    """Whether a gradient, or one of several, is spent."""
    some = gradients if isinstance(gradients, list | tuple) else [gradients]
    return any(isinstance(g, StoredRows) and g.spent for g in some)


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
    aten.detach_.default: lambda func, a: a,
    aten.alias.default: _seen_whole,
    aten.view.default: _seen_whole,
    aten._unsafe_view.default: _seen_whole,
    aten.expand.default: _seen_whole,
    aten.slice.Tensor: _seen_whole,
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
# What gives a gradient other memory and writes into none.
_REPLACES = {aten.zero_.default, aten._foreach_zero_.default, aten.copy_.default}
# What says itself what is known of a gradient's values then.
_TELLS = {aten.add_.Tensor, aten._amp_foreach_non_finite_check_and_unscale_.default}
_PRODUCTS = {aten.mul_.Tensor, aten.mul_.Scalar, aten._foreach_mul_.Tensor, aten._foreach_mul_.Scalar}
_QUOTIENTS = {aten.div_.Tensor, aten.div_.Scalar, aten._foreach_div_.Tensor, aten._foreach_div_.Scalar}
_SCALINGS = _PRODUCTS | _QUOTIENTS


def operate(func: Any, args: Any, kwargs: Any) -> Any:
    """What `__torch_dispatch__` of a gradient does."""
    several = bool(args) and isinstance(args[0], list | tuple)
    if func in _CHANGES and _spent(args[0]):
        if func not in _PRODUCTS or not _changes_nothing(args[1]):
            raise RuntimeError(SPENT)
        if not several:
            return args[0]
        args = ([g for g in args[0] if not _spent(g)], *args[1:])
    if func in _SCALINGS and not kwargs:
        left = _still_to_scale(func, list(args[0]) if several else [args[0]], args[1])
        if not left:
            return None if several else args[0]
        args = (left if several else args[0], *args[1:])
    if func._schema.is_mutable and func not in _REPLACES:
        for gradient in args[0] if several else args[:1]:
            if isinstance(gradient, StoredRows):
                gradient.own_memory()
                if func not in _TELLS:
                    gradient.forget()
    if func in _HANDLERS:
        made = _HANDLERS[func](func, *args, **kwargs)
        if made is not NotImplemented:
            return made
    return by_rule(func, args, kwargs)
