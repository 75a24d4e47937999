"""What every op's wrapper does around its kernel: choose an implementation, check arguments, allocate, set the device.

The rules: the device of the ids and of the output decides (a table in pinned host memory does not); CUDA and ROCm
devices run Triton, all others torch; `impl` forces one of the two, which is how tests run Triton's interpreter on
CPU tensors.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from . import triton_shim as jit
from .torch_private import nobody_between

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTS = (torch.int32, torch.int64)

_debug = os.environ.get("ADAPTER_KERNELS_DEBUG", "0") not in ("", "0")


def use_triton(impl: str | None, device: torch.device, unsupported: Iterable[tuple[str, str]] = ()) -> bool:
    """Whether an op whose ids and outputs live on `device` runs its Triton kernel (or else its torch path).

    Args:
        unsupported: arguments that the kernel does not take, and why: torch runs, unless `impl` asks for Triton.

    Raises:
        ValueError: `impl` is unknown, or asks for Triton where it cannot run.
    """
    if impl is None:
        return device.type == "cuda" and jit.AVAILABLE and not jit.INTERPRETED and not any(unsupported)
    require(impl in ("triton", "torch"), "impl", f'"triton", "torch" or None is needed, not {impl!r}')
    if impl == "triton":
        require(jit.AVAILABLE, "impl", "triton is not installed; leave impl at None")
        require(
            jit.INTERPRETED or device.type == "cuda",
            "impl",
            f'"triton" needs CUDA tensors, or the interpreter (TRITON_INTERPRET=1); the tensors are on {device}',
        )
        for argument, why in unsupported:
            refuse(argument, f"{why}; pass impl='torch'")
    return impl == "triton"


def at_once(tensor: Tensor, *others: Tensor | None) -> bool:
    """Whether an op on tensors in host memory may run without torch's dispatcher, which takes longer than few tokens.

    Nothing of it would be recorded, traced, or seen by a mode, nor by debug mode.
    """
    if not tensor.is_cpu or _debug or not nobody_between(tensor):
        return False
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (tensor, *others)))


def refuse(argument: str, message: str) -> NoReturn:
    """Raise a ValueError that names the argument."""
    raise ValueError(f"{argument}: {message}")


def require(satisfied: bool, argument: str, message: str) -> None:
    """Raise a ValueError that names the argument, before anything is launched."""
    if not satisfied:
        refuse(argument, message)


def require_matrix(tensor: Tensor, argument: str, dtypes: Sequence[torch.dtype], columns: int | None = None) -> None:
    """Two dimensions, one of the dtypes (float64 too, for the torch path, where several floats are asked for)."""
    # No message is made up before it is needed: in decoding they would take longer than the checks.
    if tensor.dim() != 2:
        refuse(argument, f"two dimensions are needed, not the shape {tuple(tensor.shape)}")
    known = (*dtypes, torch.float64) if torch.float32 in dtypes and len(dtypes) > 1 else tuple(dtypes)
    if tensor.dtype not in known:
        refuse(argument, f"one of {', '.join(map(str, known))} is needed, not {tensor.dtype}")
    if columns is not None and tensor.shape[1] != columns:
        refuse(argument, f"{columns} columns are needed, not {tensor.shape[1]}")


def require_same_device(**tensors: Tensor | None) -> None:
    """All on the device of the first."""
    device = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if device is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            refuse(name, f"is on {tensor.device}, but {first} is on {device}")


def half_or_single(**tensors: Tensor | None) -> Iterator[tuple[str, str]]:
    """What the kernels refuse: unlike the torch paths they have no float64."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            yield name, f"the Triton kernel has no {tensor.dtype}"


def int32(ids: Tensor) -> Tensor:
    """Ids as the kernels take them; those that do not fit stay out of range instead of wrapping around into it."""
    return ids if ids.dtype == torch.int32 else ids.clamp(-1, 2**31 - 1).to(torch.int32)


def rows_apart(tensor: Tensor) -> Tensor:
    """`tensor` itself where each row lies in one piece (any distance between rows), or else a contiguous copy."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] < 2 else tensor.contiguous()


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for an output or for scratch. Kernels allocate nowhere else: tests poison it and lay canaries around."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes `device` current, to which launches go; does nothing for a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def debug() -> bool:
    """Whether ops look at values (ids in range, no NaN), which costs a synchronisation with the device each."""
    return _debug


@contextlib.contextmanager
def debugging() -> Iterator[None]:
    """Debug mode for a while; ADAPTER_KERNELS_DEBUG=1 sets it for the process."""
    global _debug
    before, _debug = _debug, True
    try:
        yield
    finally:
        _debug = before
