"""Operations on row gradients without a function of their own: on the touched rows, or on the whole gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_bridge.torch_private import schema_of, tree_leaves, tree_map

from .part import as_part, plain, written
from .row_rules import Touched, by_rows, is_pointwise, rows_of_whole
from .stored_rows import StoredRows, check_not_consumed

aten = torch.ops.aten

_LIKE = (aten.zeros_like, aten.ones_like, aten.empty_like, aten.full_like, aten.rand_like, aten.randn_like)
_NEW = (aten.new_empty, aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty_strided, aten.randint_like)
_MAKERS = {*_LIKE, *_NEW}


def by_rule(func: Any, args: Any, kwargs: Any) -> Any:
    """Carry out an operation without a function of its own."""
    leaves = tree_leaves((args, kwargs))
    gradients = [leaf for leaf in leaves if isinstance(leaf, StoredRows)]
    if func.namespace not in ("aten", "prims", "prim"):
        raise NotImplementedError(
            f"{func} does not know gradients of MEFT rows (RowGradient), which it would leave as they are: wrap the "
            "model in DistributedDataParallel, which MEFT averages its rows under, or use .to_dense() and assign that."
        )
    if func.__name__.startswith("_foreach_"):
        return _each(func, args, kwargs)
    targets = written(func, args, kwargs)
    changed = [leaf for leaf in targets if isinstance(leaf, StoredRows)]
    for gradient in changed:
        check_not_consumed(gradient)
    if func.overloadpacket in _MAKERS:  # nothing of the gradient is in the result
        stand = {id(g): torch.empty(g.shape, dtype=g.dtype, device=g.device) for g in gradients}
        return func(*tree_map(lambda leaf: stand.get(id(leaf), plain(leaf)), args), **kwargs)
    touched = {id(g): g.touched() for g in gradients}
    in_place = len(targets) == 1 and targets[0] is args[0] if targets else True
    if gradients and in_place and bool(changed) == bool(targets):
        stands = tuple(
            tree_map(lambda leaf: touched.get(id(leaf), plain(leaf)), argument) for argument in (args, kwargs)
        )
        shape, device = gradients[0].shape, kwargs.get("device")
        if is_pointwise(func, tree_leaves(stands), shape) and device in (None, gradients[0].device):
            result = by_rows(func, *stands)
            if result is not None:
                return _gradient(*result, like=args[0] if changed else gradients[0], changed=bool(changed))
    return _on_the_whole(func, args, kwargs, targets, touched)


def _on_the_whole(func: Any, args: Any, kwargs: Any, targets: list[Any], touched: dict[int, Touched]) -> Any:
    changed = [leaf for leaf in targets if isinstance(leaf, StoredRows)]
    wholes = {key: one.whole() for key, one in touched.items()}
    narrow = {g.dtype: g.stored()[1].dtype for g in changed}  # values are held in float32 at least

    def on_whole(leaf: Any) -> Any:
        if id(leaf) in wholes:
            return wholes[id(leaf)]
        if isinstance(leaf, Tensor) and leaf.dtype in narrow and leaf.ndim:
            return plain(leaf).to(narrow[leaf.dtype])
        return plain(leaf)

    result = func(*tree_map(on_whole, args), **tree_map(on_whole, kwargs))
    changes = [(g, rows_of_whole(func, wholes[id(g)], list(touched.values()))) for g in changed]
    for gradient, stored in changes:
        gradient._stored = stored
    first = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, StoredRows)), None)
    back = {id(wholes[id(g)]): g for g in changed}

    def as_gradient(leaf: Any) -> Any:
        if id(leaf) in back:
            return back[id(leaf)]
        if first is None or any(leaf is target for target in targets):
            return leaf
        if func.is_view or not _is_gradient(leaf, first):
            return as_part(leaf, first.numel(), func.is_view)
        return _gradient(*rows_of_whole(func, leaf, list(touched.values())), like=first)

    return tree_map(as_gradient, result)


def _is_gradient(leaf: Any, like: StoredRows) -> bool:
    return (
        isinstance(leaf, Tensor)
        and leaf.is_floating_point()
        and leaf.shape == like.shape
        and leaf.device == like.device
        and leaf.layout == torch.strided
    )


def _gradient(rows: Tensor, values: Tensor, *, like: StoredRows, changed: bool = False) -> StoredRows:
    held = like.stored()[1].dtype
    dtype = like.dtype if values.dtype == held else values.dtype
    stored = rows, values.to(torch.promote_types(values.dtype, torch.float32))
    if not changed:
        return type(like)._of(stored, like, dtype)
    like._stored = stored[0], stored[1].to(held)
    return like


def _each(func: Any, args: Any, kwargs: Any) -> list[Any] | None:
    """One of torch's `_foreach` operations, gradient by gradient."""
    single = getattr(aten, schema_of(func).name.removeprefix("aten::_foreach_"))
    lists = [value for value in (*args, *kwargs.values()) if isinstance(value, list | tuple)]
    results = []
    for i in range(len(lists[0])):
        single_args = [value[i] if isinstance(value, list | tuple) else value for value in args]
        if single in (aten.addcmul, aten.addcmul_, aten.addcdiv, aten.addcdiv_) and len(single_args) == 4:
            kwargs = {"value": args[3]}
            single_args.pop()
        results.append(
            single(*single_args, **{k: v[i] if isinstance(v, list | tuple) else v for k, v in kwargs.items()})
        )
    return None if schema_of(func).is_mutable else results
