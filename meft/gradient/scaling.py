"""Products, clipping, norms and unscaling of row gradients: what a Trainer does between backward and step.

Products with a number are postponed where possible: the update multiplies the values as it reads them.
"""

from __future__ import annotations

import math
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..transport.transfer import wait_for_copies
from .stored_rows import StoredRows, values_of

aten = torch.ops.aten

PRODUCTS = {aten.mul_.Tensor, aten.mul_.Scalar, aten._foreach_mul_.Tensor, aten._foreach_mul_.Scalar}
QUOTIENTS = {aten.div_.Tensor, aten.div_.Scalar, aten._foreach_div_.Tensor, aten._foreach_div_.Scalar}
SCALINGS = PRODUCTS | QUOTIENTS


def in_place(func: Any, a: StoredRows, *args: Any, **kwargs: Any) -> StoredRows:
    """In-place operations that keep zeros zero: on the touched rows."""
    if any(isinstance(arg, Tensor) and (isinstance(arg, StoredRows) or arg.numel() != 1) for arg in (a, *args)[1:]):
        return NotImplemented
    func(values_of(a), *args, **kwargs)
    return a


def foreach_in_place(func: Any, gradients: list[Tensor], *args: Any, **kwargs: Any) -> None:
    """As `in_place`, of several gradients, plain tensors and shards, which torch takes by themselves alone."""
    for sharded in (False, True):
        some = [values_of(g) for g in gradients if isinstance(g, DTensor) is sharded]
        if some:
            func(some, *args, **kwargs)


def _is_number(factor: Any) -> bool:
    """Whether it is a real number that can be read without waiting for a device."""
    if isinstance(factor, Tensor):
        return type(factor) is Tensor and not factor.ndim and factor.is_cpu and not factor.is_complex()
    return isinstance(factor, int | float)


def to_scale_now(func: Any, gradients: list[Any], factor: Any) -> list[Any]:
    """The gradients that have to be scaled now: not by 1, and not those that are multiplied when they are read next."""
    if not _is_number(factor):
        return gradients
    if float(factor) == 1.0:
        return [g for g in gradients if not (isinstance(g, StoredRows) and g.is_cpu)]
    if func not in PRODUCTS:
        return gradients
    return [g for g in gradients if not (isinstance(g, StoredRows) and g.multiply_later(factor))]


def changes_nothing(factor: Any) -> bool:
    """Whether a factor is 1, or nan as of a norm that is not finite: a Trainer that only logs the norm passes these."""
    if isinstance(factor, Tensor) and factor.numel() != 1:
        return False
    return float(factor) == 1.0 or math.isnan(float(factor))


class OverflowWatcher(Protocol):
    """Gets a call for each step that a GradScaler will skip."""

    def note_overflow(self, owners: set[int], found_inf: Tensor) -> None:
        """`found_inf` is set, and gradients of these tables were among the unscaled ones."""


overflow_watchers: weakref.WeakSet[OverflowWatcher] = weakref.WeakSet()


def unscale(func: Any, gradients: list[Tensor], found_inf: Tensor, inverse_scale: Tensor) -> None:
    """What `GradScaler.unscale_` calls; tells the watchers if a gradient of rows is inf or nan."""
    if found_inf.is_cpu:
        # GradScaler copies both from its device without waiting: a late copy would overwrite the flag that is set here.
        wait_for_copies([found_inf, inverse_scale])
    others = [g for g in gradients if not _unscaled(g, inverse_scale)]
    for gradient in others:
        if isinstance(gradient, StoredRows):
            gradient.forget()
    if others:
        foreach_in_place(func, others, found_inf, inverse_scale)
    owners = {g.owner for g in gradients if isinstance(g, StoredRows)}
    if owners and bool(found_inf > 0):
        for watcher in list(overflow_watchers):
            watcher.note_overflow(owners, found_inf)


def _unscaled(gradient: Any, inverse_scale: Tensor) -> bool:
    """Whether a gradient is known to be finite and unscaled now, without reading its values."""
    if not isinstance(gradient, StoredRows) or not inverse_scale.is_cpu:
        return False
    known = gradient.squares()
    if known is None or not math.isfinite(known):
        return False
    return float(inverse_scale) == 1.0 or gradient.multiply_later(inverse_scale.reshape(()))


def clamp(
    func: Any,
    a: StoredRows,
    min: float | None = None,
    max: float | None = None,  # torch's names
) -> StoredRows:
    """On the touched rows, to an interval that contains 0."""
    _check_bounds(min, max)
    func(values_of(a), min, max)
    return a


def foreach_clamp(func: Any, gradients: list[Tensor], bound: float) -> None:
    """As `clamp`, with one bound, of several gradients and plain tensors."""
    if any(isinstance(g, StoredRows) for g in gradients):
        _check_bounds(*((bound, None) if func is aten._foreach_clamp_min_.Scalar else (None, bound)))
    foreach_in_place(func, gradients, bound)


def _check_bounds(low: float | None, high: float | None) -> None:
    if (low is not None and low > 0) or (high is not None and high < 0):
        raise NotImplementedError(
            f"Clamping a gradient of MEFT rows to [{low}, {high}] is an interval without 0: it would become dense."
        )


def norm(func: Any, a: StoredRows, ord: float = 2, *args: Any, **kwargs: Any) -> Tensor:
    """Of the touched rows; the 2-norm without reading them where the sum of their squares is known."""
    if any(arg not in (None, False) for arg in args) or kwargs.get("dim") is not None or ord < 0:
        return NotImplemented
    known = a.squares() if ord == 2 and not kwargs.keys() - {"dtype"} else None
    if known is not None:
        return torch.tensor(math.sqrt(known), dtype=kwargs.get("dtype") or torch.float32, device="cpu")
    values = values_of(a)
    if not values.numel():
        return values.new_zeros(())  # torch raises for the inf-norm of no values
    return func(values, ord, *args, **kwargs)


def foreach_norm(func: Any, gradients: list[Tensor], ord: float = 2, dtype: torch.dtype | None = None) -> list[Tensor]:
    """As `norm`, of several gradients and plain tensors."""
    return [aten.linalg_vector_norm.default(g, ord, dtype=dtype) for g in gradients]
