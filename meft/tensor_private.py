"""Names of torch that its documentation leaves out; `tests/meft/test_tensor_private.py` says what they do."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

without_torch_function = torch._C.DisableTorchFunctionSubclass
GET_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
GET_GRAD = torch.Tensor.grad.__get__  # type: ignore[union-attr]


def become(tensor: Tensor, kind: type[Tensor], is_parameter: bool) -> None:
    """Give a tensor another class in place, as `torch.utils.swap_tensors` does.

    Args:
        is_parameter: whether it is an instance of `nn.Parameter` then.
    """
    tensor.__class__ = kind  # type: ignore[assignment]
    if is_parameter:
        tensor._is_param = True  # type: ignore[attr-defined]


def is_parameter(tensor: Tensor) -> bool:
    """Whether `become` has made it a parameter."""
    return bool(tensor.__dict__.get("_is_param"))


def _users(tensor: Tensor) -> int:
    with without_torch_function():
        storage = tensor.untyped_storage()
        # All handles are one Python object, which counts once as a user of the memory.
        return torch._C._storage_Use_Count(storage._cdata) + sys.getrefcount(storage)  # type: ignore[attr-defined]


_ALONE = _users(torch.empty(1, device="cpu"))


def other_users(tensor: Tensor) -> int:
    """How many other tensors, arrays and handles of a storage share a tensor's memory."""
    return _users(tensor) - _ALONE


def storage_address(tensor: Tensor) -> int:
    """What tells the memory of living tensors apart; 0 of tensors that have none."""
    try:
        with without_torch_function():
            return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse, nested
        return 0
