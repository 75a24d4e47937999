"""Sums, copies, views and zeroing of row gradients."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from peft_bridge.torch_private import ENGINE_CODE

from .host.accumulator import Pending
from .split import merged
from .stored_rows import CONSUMED, StoredRows, values_of

aten = torch.ops.aten


def _with(gradient: StoredRows, rows: Tensor, values: Tensor) -> StoredRows:
    return type(gradient)(rows, values, gradient)


def _by_autograd() -> bool:
    """Whether the autograd engine called this operation, not a function outside of this package."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and str(frame.f_globals.get("__name__")).startswith("meft."):
        frame = frame.f_back
    return frame is None or frame.f_code is ENGINE_CODE


def add(func: Any, a: Any, b: Any, *, alpha: float = 1) -> Any:
    """The sum of two gradients, of which either may still arrive, or of one and a dense gradient that autograd adds."""
    own = a if isinstance(a, StoredRows) else b
    if not (isinstance(a, StoredRows) and isinstance(b, StoredRows)):
        other = b if own is a else a
        if not isinstance(other, Tensor) or other.shape != own.shape:
            return NotImplemented
        if func is aten.add_.Tensor and own is b:  # a plain tensor stays one
            return a.index_add_(0, b.rows, values_of(b).to(a.dtype), alpha=alpha)
        if not _by_autograd():
            return NotImplemented
        # The other gradient is dense (of a penalty, for example): all rows are touched.
        whole = _with(own, torch.arange(len(other), device=other.device), other)
        a, b = (own, whole) if own is a else (whole, own)
    if alpha != 1:
        b = _with(b, b.rows, values_of(b) * alpha)
    in_place = func is aten.add_.Tensor
    if a.has_no_rows:
        a.consumed = b.consumed
        if in_place and isinstance(b._stored, Pending):
            a.take_over(b)
            return a
    elif a.consumed or b.consumed:
        raise RuntimeError(CONSUMED)
    for gradient in (a, b):
        gradient.multiply_now()
    total = a if in_place else a._of(a._stored, a)
    total.become_sum(merged(a._stored, b._stored, len(a), in_place=in_place), a if in_place else None)
    return total


def _no_rows(a: StoredRows) -> tuple[Tensor, Tensor]:
    """Rows and values of a zero gradient; no slices, which would keep the memory of all alive."""
    own = a.dtype if isinstance(a._stored, Pending) else a._stored[1].dtype
    values = torch.empty(0, *a.shape[1:], dtype=torch.promote_types(own, torch.float32), device=a.device)
    return torch.empty(0, dtype=torch.int64, device=a.device), values


def zero(func: Any, a: StoredRows) -> StoredRows:
    """A gradient without touched rows."""
    a._stored, a.consumed = _no_rows(a), False
    return a


def foreach_zero(func: Any, gradients: list[Tensor]) -> None:
    """As `zero`, of several gradients and plain tensors."""
    for gradient in gradients:
        gradient.zero_()


def detach(func: Any, a: StoredRows) -> StoredRows:
    """An alias: what is written into either is in both."""
    alias = a._of(a._stored, a)
    alias._held = a._held
    return alias


def whole_view(func: Any, a: StoredRows, *args: Any) -> StoredRows:
    """An alias, if the view has all values in the same shape."""
    if func is aten.slice.Tensor:
        bounds: list[Any] = [*args, *[0, None, None, 1][len(args) :]]
        dim, start, end, step = bounds
        same = start in (None, 0) and (end is None or end >= a.shape[dim]) and step == 1
    else:
        size = list(args[0]) if args else list(a.shape)
        same = len(size) == a.ndim and all(new in (-1, old) for new, old in zip(size, a.shape, strict=True))
    return detach(func, a) if same else NotImplemented


def clone(func: Any, a: StoredRows, **kwargs: Any) -> StoredRows:
    """A copy with memory of its own."""
    return _with(a, a.rows, values_of(a).clone())


def new_empty(func: Any, a: StoredRows, size: Any, *args: Any, **kwargs: Any) -> StoredRows:
    """A zero gradient of the same shape, into which autograd copies another."""
    if list(size) != list(a.shape):
        return NotImplemented
    return _with(a, *_no_rows(a))


def copy(func: Any, a: Any, b: Any, non_blocking: bool = False) -> Any:
    """Copy `b` into `a`."""
    if not isinstance(a, StoredRows):
        return a.copy_(b.to_dense())
    if not isinstance(b, StoredRows):
        return NotImplemented
    # A gradient that still arrives has no other user: autograd copies it only because it is a tensor subclass.
    if isinstance(b._stored, Pending):
        a.take_over(b)
    else:
        a._stored = b.rows, values_of(b).clone()
    a.consumed = b.consumed
    return a
