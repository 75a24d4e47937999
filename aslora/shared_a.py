"""The A that layers share, and its product with an input that several of them read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from peft_bridge.deepspeed_private import ZeroSteps
from peft_bridge.torch_private import saved_tensors_hooked

from .sharing.sharded import full_tensor


class SharedA(nn.Module):
    """The one A of an A-group.

    Parameter `shared_A`: [r, in_features].

    Attributes:
        products: the last product of an input with A.
        zero: DeepSpeed's steps of a copy of A; None: there is none.
    """

    zero: ZeroSteps | None = None

    def __init__(self, r: int, in_features: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.shared_A = nn.Parameter(torch.empty(r, in_features, dtype=dtype, device=device))
        nn.init.kaiming_uniform_(self.shared_A, a=math.sqrt(5))  # as LoRA does
        self.products = InputProducts()

    def forward(self) -> Tensor:
        """A [r, in_features]."""
        return self.shared_A

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SharedA:
        super()._apply(fn, recurse)
        self.products.forget()  # a move writes A without a new version
        return self

    def full_tensor(self) -> Tensor:
        """The full A [r, in_features] without autograd, as precise as it is stepped."""
        return full_tensor(self.shared_A, self.zero)

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle."""
        return {**self.__dict__, "zero": None}


class _Product(NamedTuple):
    x: TensorWeakRef
    A: TensorWeakRef
    value: TensorWeakRef
    state: tuple[Any, ...]
    readers: set[int]  # ids of the layers that have read it


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype in which autocast multiplies matrices; None where it does nothing."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


class InputProducts:
    """x A^T, made once where several layers read the same x and A (q, k and v, or gate and up, with one A for all).

    Nothing is kept alive here. The autograd graph holds the product, for the gradient of B, and no longer than that
    graph may another layer read it. So it is made anew without gradients, and where hooks take what the graph saves
    (checkpointing without reentry, offloading). Layers that share it have one graph: a backward pass through one of
    them alone, and a later one through another, need `retain_graph=True` in the first.
    """

    def __init__(self) -> None:
        self._last: _Product | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle, which do not take weak references."""
        return {"_last": None}

    def forget(self) -> None:
        """Let the next layer make a product of its own."""
        self._last = None

    def get(self, reader: object, x: Tensor, A: Tensor, scaling: float, make: Callable[[], Tensor]) -> Tensor:
        """The product that `make` gives, or has given for another layer.

        Args:
            reader: the layer that asks. A second time it begins another pass, which gets a product of its own.
            x: the input; another object, or the same one written since, has another product.
            scaling: factor in the product.
            make: computes it; called with the arguments that are given here, it depends on nothing else.
        """
        # An x without a graph of its own can be differentiated through one reader first and through another later.
        if x.grad_fn is None or not torch.is_grad_enabled() or saved_tensors_hooked():
            return make()
        state = (x._version, A._version, A.requires_grad, scaling, autocast_dtype(x.device.type))
        last = self._last
        if last is not None and last.state == state and id(reader) not in last.readers:
            value = last.value()
            if value is not None and last.x() is x and last.A() is A:
                last.readers.add(id(reader))
                return value  # type: ignore[no-any-return]
        value = make()
        self._last = _Product(TensorWeakRef(x), TensorWeakRef(A), TensorWeakRef(value), state, {id(reader)})
        return value
