"""Host memory of rows, moments and staging buffers, which forked processes do not get.

A worker of a `DataLoader`, or an evaluation beside the run, is forked: from then on each page that either process
writes is copied, and the kernel write protects all of them for it. So on Linux these pages are marked with
MADV_DONTFORK for as long as they hold such a tensor.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Rows handled at a time where a whole table is read or written, so that no second table comes into being.
BLOCK_BYTES = 64 << 20
_LEAST = 1 << 16  # bytes; of smaller tensors most are not whole pages

_forks = 0  # forks between the process that was started first and this one


def _forked() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def forks() -> int:
    """A number that differs in a forked process from that of the process that it was forked from."""
    return _forks


def check_process(since: int) -> None:
    """Check that this process has the memory of what was made in another one.

    Args:
        since: what `forks` said there.

    Raises:
        RuntimeError: it was forked since.
    """
    if since != _forks:
        raise RuntimeError(
            "MEFT's rows are not in the memory of a forked process: use the model in the process that made it, or "
            "start the other one with the method 'spawn' (DataLoader: multiprocessing_context='spawn')."
        )


@functools.cache
def _madvise() -> Any:
    """The C library's function; None where the system has none that keeps pages from a fork."""
    if not hasattr(mmap, "MADV_DONTFORK"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def _advise(start: int, size: int, advice: int) -> None:
    _madvise()(start, size, advice)


def keep_from_forks(tensor: Tensor) -> Tensor:
    """Mark the whole pages of a host tensor's memory, until that is given back.

    Returns:
        the tensor.
    """
    if tensor.is_cpu and tensor.nbytes >= _LEAST and _madvise() is not None:
        storage = tensor.untyped_storage()
        page = mmap.PAGESIZE
        first = -(-storage.data_ptr() // page) * page
        size = (storage.data_ptr() + storage.nbytes()) // page * page - first
        _advise(first, size, mmap.MADV_DONTFORK)
        # Memory that is allocated there later goes to forked processes as usual.
        weakref.finalize(storage, _advise, first, size, mmap.MADV_DOFORK)
    return tensor


def host_zeros(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros in host memory, whatever the default device is, which forked processes do not get."""
    return keep_from_forks(torch.zeros(shape, dtype=dtype, device="cpu"))


def like_rows(rows: Tensor, dtype: torch.dtype, shape: tuple[int, ...] | torch.Size | None = None) -> Tensor:
    """Zeros where some rows are, of their shape if none is given; in host memory as `host_zeros` makes them."""
    shape = rows.shape if shape is None else shape
    return host_zeros(shape, dtype) if rows.is_cpu else torch.zeros(shape, dtype=dtype, device=rows.device)


def row_blocks(table: Tensor) -> Iterator[slice]:
    """Slices of rows of about `BLOCK_BYTES` each."""
    step = max(1, BLOCK_BYTES // max(1, table[:1].numel() * table.element_size()))
    for start in range(0, len(table), step):
        yield slice(start, min(start + step, len(table)))
