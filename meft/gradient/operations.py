"""Dispatch of torch's operations on row gradients: to functions of this package, or to the general rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from peft_bridge.torch_private import schema_of

from . import copies, scaling
from .rules import by_rule
from .scaling import PRODUCTS, SCALINGS, changes_nothing, to_scale_now
from .stored_rows import CONSUMED, StoredRows

aten = torch.ops.aten


def _consumed(argument: Any) -> bool:
    """Whether a gradient, or one of several, is consumed."""
    gradients = argument if isinstance(argument, list | tuple) else [argument]
    return any(isinstance(g, StoredRows) and g.consumed for g in gradients)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: copies.add,
    aten.add_.Tensor: copies.add,
    aten.mul_.Tensor: scaling.in_place,
    aten.mul_.Scalar: scaling.in_place,
    aten.div_.Tensor: scaling.in_place,
    aten.div_.Scalar: scaling.in_place,
    aten.neg_.default: scaling.in_place,
    aten.clamp_.default: scaling.clamp,
    aten._foreach_mul_.Tensor: scaling.foreach_in_place,
    aten._foreach_mul_.Scalar: scaling.foreach_in_place,
    aten._foreach_div_.Tensor: scaling.foreach_in_place,
    aten._foreach_div_.Scalar: scaling.foreach_in_place,
    aten._foreach_clamp_min_.Scalar: scaling.foreach_clamp,
    aten._foreach_clamp_max_.Scalar: scaling.foreach_clamp,
    aten._amp_foreach_non_finite_check_and_unscale_.default: scaling.unscale,
    aten.linalg_vector_norm.default: scaling.norm,
    aten._foreach_norm.Scalar: scaling.foreach_norm,
    aten.zero_.default: copies.zero,
    aten._foreach_zero_.default: copies.foreach_zero,
    aten.detach.default: copies.detach,
    aten.detach_.default: lambda func, a: a,
    aten.alias.default: copies.whole_view,
    aten.view.default: copies.whole_view,
    aten._unsafe_view.default: copies.whole_view,
    aten.expand.default: copies.whole_view,
    aten.slice.Tensor: copies.whole_view,
    aten.clone.default: copies.clone,
    aten.new_empty_strided.default: copies.new_empty,
    aten.copy_.default: copies.copy,
}

# Operations that change a gradient in another way than zeroing or replacing it.
_CHANGES = {
    func
    for func, handler in _HANDLERS.items()
    if handler in (scaling.in_place, scaling.foreach_in_place, scaling.clamp, scaling.foreach_clamp, scaling.unscale)
}
# Operations that give a gradient other memory and do not write into the memory it has.
_REPLACES = {aten.zero_.default, aten._foreach_zero_.default, aten.copy_.default}
# Operations that update by themselves what is known of a gradient's values (`KnownValues`).
_UPDATES_KNOWN = {aten.add_.Tensor, aten._amp_foreach_non_finite_check_and_unscale_.default}


def operate(func: Any, args: Any, kwargs: Any) -> Any:
    """Carry out an operation that `__torch_dispatch__` of a gradient got."""
    if len(args) > 1 and isinstance(args[1], DTensor) and not args[1].ndim:  # a norm of shards beside the rows
        args = (args[0], args[1].full_tensor(), *args[2:])
    several = bool(args) and isinstance(args[0], list | tuple)
    if func in _CHANGES and _consumed(args[0]):
        if func not in PRODUCTS or not changes_nothing(args[1]):
            raise RuntimeError(CONSUMED)
        if not several:
            return args[0]
        args = ([g for g in args[0] if not _consumed(g)], *args[1:])
    if func in SCALINGS and not kwargs:
        left = to_scale_now(func, list(args[0]) if several else [args[0]], args[1])
        if not left:
            return None if several else args[0]
        args = (left if several else args[0], *args[1:])
    if schema_of(func).is_mutable and func not in _REPLACES:
        for gradient in args[0] if several else args[:1]:
            if isinstance(gradient, StoredRows):
                gradient.own_memory()
                if func not in _UPDATES_KNOWN:
                    gradient.forget()
    if func in _HANDLERS:
        result = _HANDLERS[func](func, *args, **kwargs)
        if result is not NotImplemented:
            return result
    return by_rule(func, args, kwargs)
