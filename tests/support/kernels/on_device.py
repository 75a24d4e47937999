"""Runs an op on another device than its arguments are on; poison and fences around them travel too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _raw(tensor: Tensor) -> Tensor:
    """The whole memory that a tensor is part of."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


class _Moved:
    """Copies of the memory of an op's arguments, of each memory one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copies: dict[int, tuple[Tensor, Tensor]] = {}  # address -> here, there

    def there(self, tensor: Tensor) -> Tensor:
        """The tensor with the same offset and strides in a copy of its memory."""
        address = tensor.untyped_storage().data_ptr()
        if address not in self.copies:
            here = _raw(tensor)
            self.copies[address] = here, here.to(self.device, copy=True)
        place = tensor.storage_offset(), tensor.size(), tensor.stride()
        storage = self.copies[address][1].untyped_storage()
        return torch.empty(0, dtype=tensor.dtype, device=self.device).set_(storage, *place)

    def come_back(self) -> None:
        """What the op wrote, in its place or beside it, is there in the arguments too."""
        for here, there in self.copies.values():
            here.copy_(there)


class _There(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, moved):
        return moved.there(tensor.detach())

    @staticmethod
    def backward(ctx, gradient):
        return gradient.cpu(), None


class _Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out):
        ctx.device = out.device
        return out.to("cpu", copy=True)

    @staticmethod
    def backward(ctx, gradient):
        return _Moved(ctx.device).there(gradient)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        mapped = [_mapped(each, change) for each in value]
        return type(value)(*mapped) if hasattr(value, "_fields") else type(value)(mapped)
    return value


def on_device(op: Callable[..., Any], device: torch.device | str) -> Callable[..., Any]:
    """The op, for arguments and results on the CPU, computed on a device, its backward pass too."""

    @functools.wraps(op, assigned=())
    def call(*args: Any, **kwargs: Any) -> Any:
        moved = _Moved(torch.device(device))

        def there(tensor: Tensor) -> Tensor:
            return _There.apply(tensor, moved) if tensor.requires_grad else moved.there(tensor)

        result = op(*_mapped(args, there), **{name: _mapped(value, there) for name, value in kwargs.items()})
        moved.come_back()
        return _mapped(result, lambda out: _Back.apply(out) if out.requires_grad else out.to("cpu", copy=True))

    return call
