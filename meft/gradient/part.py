"""Tensors that were computed from a whole gradient of rows: they can be read, but not used as a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_bridge.torch_private import PLAIN_TORCH_FUNCTION, make_wrapper_subclass, schema_of, tree_leaves, tree_map


class PartOfGradient(torch.Tensor):
    """A view of a gradient, which cannot be written into, or a tensor as large as it that was made of it.

    As the `.grad` of rows it is refused at the step: it would touch all of them.

    Attributes:
        least: values of the gradient: results that have as many are of this class too.
        is_view: whether writing into it is meant to reach the gradient, which it would not.
    """

    _part: Tensor
    least: int
    is_view: bool

    __torch_function__ = PLAIN_TORCH_FUNCTION

    @staticmethod
    def __new__(cls, part: Tensor, least: int, is_view: bool) -> PartOfGradient:
        """Args: part: the values."""
        self = make_wrapper_subclass(cls, part.shape, dtype=part.dtype, device=part.device)
        self._part, self.least, self.is_view = part, least, is_view
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self._part)

    def numpy(self, **kwargs: Any) -> Any:
        array = self._part.numpy(**kwargs)
        if self.is_view:
            array.flags.writeable = False
        return array

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy().__array__(*args, **kwargs)

    def tolist(self) -> Any:
        return self._part.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        parts = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, PartOfGradient)]
        targets = written(func, args, kwargs)
        if any(isinstance(leaf, PartOfGradient) and leaf.is_view for leaf in targets):
            raise NotImplementedError(
                f"{func} would write into a view of a gradient of MEFT rows (RowGradient), which is a copy: write into "
                "the gradient itself (p.grad[...] = ...), or use .to_dense() and assign that."
            )
        result = func(*tree_map(plain, args), **tree_map(plain, kwargs))
        own = {id(plain(leaf)): leaf for leaf in targets}
        view = func.is_view and parts[0].is_view
        least = min(part.least for part in parts)
        return tree_map(lambda leaf: own.get(id(leaf), as_part(leaf, least, view)), result)


def as_part(value: Any, least: int, is_view: bool) -> Any:
    """A tensor as part of a gradient, if it is a view or large enough to become one; anything else as it is."""
    if type(value) is not Tensor or not value.is_floating_point() or value.layout != torch.strided:
        return value
    return PartOfGradient(value, least, is_view) if is_view or value.numel() >= least else value


def plain(value: Any) -> Any:
    """The tensor in a part of a gradient; anything else as it is."""
    return value._part if isinstance(value, PartOfGradient) else value


def written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that an operation writes into."""
    schema = schema_of(func)
    if not schema.is_mutable:
        return []
    named = dict(zip([a.name for a in schema.arguments], args, strict=False)) | kwargs
    names = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return tree_leaves([named[name] for name in names if named.get(name) is not None])
