"""Views of a gradient of rows, which can be looked at and not written into."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


class PartOfGradient(torch.Tensor):
    """A view of a gradient, to look at: what is written into it would not reach the gradient, so it cannot be."""

    _part: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, part: Tensor) -> PartOfGradient:
        """Args: part: the view, of a copy of the whole gradient."""
        self = torch.Tensor._make_wrapper_subclass(cls, part.shape, dtype=part.dtype, device=part.device)
        self._part = part
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self._part)

    def numpy(self, **kwargs: Any) -> Any:
        array = self._part.numpy(**kwargs)
        array.flags.writeable = False
        return array

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy().__array__(*args, **kwargs)

    def tolist(self) -> Any:
        return self._part.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if any(isinstance(leaf, PartOfGradient) for leaf in written(func, args, kwargs)):
            raise NotImplementedError(
                f"{func} would write into a view of a gradient of MEFT rows (RowGradient), which is a copy: write into "
                "the gradient itself (p.grad[...] = ...), or use .to_dense() and assign that."
            )
        found = func(*tree_map(plain, args), **tree_map(plain, kwargs))
        return tree_map(read_only, found) if func.is_view else found


def plain(value: Any) -> Any:
    """The tensor in a part of a gradient; anything else as it is."""
    return value._part if isinstance(value, PartOfGradient) else value


def read_only(value: Any) -> Any:
    """A part with this tensor; anything else as it is."""
    return PartOfGradient(value) if isinstance(value, Tensor) else value


def written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that an operation writes into."""
    if not func._schema.is_mutable:
        return []
    named = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | kwargs
    names = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return tree_leaves([named[name] for name in names if named.get(name) is not None])
