"""Host memory of rows, moments and staging buffers: the one place that makes it.

A forked process (a worker of a `DataLoader`, an evaluation beside the run) does not get it: on Linux the pages are
marked with MADV_DONTFORK, since each page that either process writes after a fork would be copied, and the kernel would
write protect all of them for it. `mmap` gives whole pages that nothing else lies on.
"""

from __future__ import annotations

import math
import mmap
import os

import torch
from torch import Tensor

_LEAST = 1 << 16  # bytes; of smaller tensors most are not whole pages

_forks = 0  # forks between the process that was started and this one


def _forked() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def forks() -> int:
    """A number that differs in a forked process from that of the process that it was forked from."""
    return _forks


def host_zeros(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros in host memory that forked processes do not get; pages come into being when they are written.

    Returns:
        a contiguous tensor on the CPU, whatever the default device is.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _LEAST or not hasattr(mmap, "MADV_DONTFORK"):
        return torch.zeros(shape, dtype=dtype, device="cpu")
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_DONTFORK)
    # The tensor holds on to the mapping, and the mapping goes with the last tensor of its memory.
    return torch.frombuffer(pages, dtype=torch.uint8, count=size).view(dtype).view(shape)


def host_copy(tensor: Tensor) -> Tensor:
    """The values of a tensor in host memory that forked processes do not get."""
    return host_zeros(tensor.shape, tensor.dtype).copy_(tensor)
