"""Rows by ids out of one or two tables into compact buffers, and back: `gather_rows` and its twin `scatter_rows`.

    gather:  out[k] = table[ids[k]], zeros where ids[k] is -1        scatter:  table[ids[k]] = rows[k], -1 is left out

Copies, so bits are exact, NaN and signed zeros too. Not differentiable: the gradients of compact rows come out of
`sparse_ffn` and go to the tables by `row_adamw` or `scatter_rows`; an autograd graph through a table in host memory
would make a gradient of the whole table.

A table lies on the device of the ids or, for ids on a CUDA device, in page-locked host memory, which the kernel reads
and writes itself (zero-copy): no staging buffer, no wait for the ids. Torch's host allocator does not see that: keep
the tensor alive, and wait on an event before the host writes what a gather may still read, or reads what a scatter
writes. Where a device cannot reach host memory (WSL2, confidential computing), which is tried once, rows are staged:
the ids come to the host, rows are copied into page-locked memory there and cross in one piece.

An id outside of -1 to r - 1 is a ValueError on the CPU and in debug mode, and otherwise as -1: nothing out of bounds
is read or written. Ids of a scatter must be distinct. Limits: two tables of one shape and dtype; 2^31 - 1 columns.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ..runtime import dispatch
from ..runtime import triton_shim as jit
from . import gather_rows_torch, gather_rows_triton

_log = logging.getLogger(__name__)


@cache
def _host_memory_reachable(device: torch.device) -> bool:
    """Whether kernels on a CUDA device can read and write page-locked host memory; tried with one row, once."""
    try:
        if not jit.AVAILABLE:
            raise RuntimeError("triton is not installed")
        with dispatch.device_guard(device):  # page-locking makes a context on the current device
            table = torch.arange(64, dtype=torch.float32, device="cpu").view(1, 64).pin_memory()
        if table.is_pinned():
            ids = torch.zeros(1, dtype=torch.int32, device=device)
            out = torch.empty(1, 64, device=device)
            gather_rows_triton.copy_rows(ids, [table], [out], 1, False)
            gather_rows_triton.copy_rows(ids, [out + 1], [table], 1, True)
            torch.cuda.synchronize(device)
            if torch.equal(out.cpu() + 1, table):
                return True
        reason = "memory cannot be page-locked, or not be read back"
    except (RuntimeError, ValueError) as error:  # Triton's launcher raises ValueError where the driver has no address
        reason = str(error).splitlines()[0]
    _log.warning("%s cannot reach host memory (%s): rows are staged in page-locked buffers instead.", device, reason)
    return False


def require_reachable(tensor: Tensor, argument: str, device: torch.device) -> None:
    """On the device of the ids, or in host memory beside a CUDA device."""
    reachable = tensor.device == device or (tensor.device.type == "cpu" and device.type == "cuda")
    if not reachable:
        dispatch.refuse(argument, f"is on {tensor.device}, but the ids are on {device}")


def zero_copy(device: torch.device, **tensors: Tensor | None) -> bool:
    """Whether kernels on `device` can take these tensors; nothing to ask where all are on the device.

    Raises:
        ValueError: one is on another device or in pageable host memory.
    """
    elsewhere = {name: x for name, x in tensors.items() if x is not None and x.device != device}
    for name, x in elsewhere.items():
        require_reachable(x, name, device)
        if not x.is_pinned():
            dispatch.refuse(name, "is in pageable host memory, which a GPU cannot read; page-lock it")
    return not elsewhere or _host_memory_reachable(device)


def _copy(ids: Tensor, sources: list[Tensor], targets: list[Tensor], scatter: bool, impl: str | None) -> None:
    tables = targets if scatter else sources
    reachable = zero_copy(ids.device, **{f"tables[{i}]": table for i, table in enumerate(tables)})
    if dispatch.debug():
        gather_rows_torch.require_in_range(ids, len(tables[0]))
        used = ids[ids >= 0]
        distinct = not scatter or len(used.unique()) == len(used)
        if not distinct:
            dispatch.refuse("ids", "a row is written twice; which one stays is not defined")
    if dispatch.use_triton(impl, ids.device, dispatch.half_or_single(**{"tables[0]": tables[0]})) and reachable:
        if len(ids) and tables[0].shape[1]:
            gather_rows_triton.copy_rows(ids, sources, targets, len(tables[0]), scatter)
        return
    for source, target in zip(sources, targets, strict=True):
        (gather_rows_torch.scatter if scatter else gather_rows_torch.gather)(ids, source, target)


@torch.library.custom_op("adapter_kernels::gather_rows", mutates_args=("out",))
def _gather_op(ids: Tensor, tables: list[Tensor], out: list[Tensor], impl: str | None) -> None:
    _copy(ids, tables, out, False, impl)


@torch.library.custom_op("adapter_kernels::scatter_rows", mutates_args=("tables",))
def _scatter_op(ids: Tensor, rows: list[Tensor], tables: list[Tensor], impl: str | None) -> None:
    _copy(ids, rows, tables, True, impl)


@_gather_op.register_fake
@_scatter_op.register_fake
def _(*_: object) -> None:
    """They change what they are given, and return nothing."""


def _check(ids: Tensor, tables: Sequence[Tensor], compact: Sequence[Tensor], name: str) -> None:
    if ids.dim() != 1:
        dispatch.refuse("ids", f"one dimension is needed, not the shape {tuple(ids.shape)}")
    if ids.dtype not in dispatch.INTS:
        dispatch.refuse("ids", f"int32 or int64 is needed, not {ids.dtype}")
    if not ids.is_contiguous():
        dispatch.refuse("ids", "contiguous ids are needed")
    if not (1 <= len(tables) <= 2):
        dispatch.refuse("tables", f"one or two are needed, not {len(tables)}")
    if len(compact) != len(tables):
        dispatch.refuse(name, f"{len(compact)} buffers for {len(tables)} tables")
    for i, table in enumerate(tables):
        dispatch.require_matrix(table, f"tables[{i}]", dispatch.FLOATS)
        if not table.is_contiguous():
            dispatch.refuse(f"tables[{i}]", "a contiguous table is needed")
        same = table.shape == tables[0].shape and table.dtype == tables[0].dtype
        if not same:
            dispatch.refuse(f"tables[{i}]", "another shape or dtype than tables[0]")
        require_reachable(table, f"tables[{i}]", ids.device)
    for i, buffer in enumerate(compact):
        shape = (len(ids), tables[0].shape[1])
        fits = tuple(buffer.shape) == shape and buffer.dtype == tables[0].dtype and buffer.is_contiguous()
        if not fits:
            dispatch.refuse(f"{name}[{i}]", f"contiguous {tables[0].dtype} {shape} is needed")
        if buffer.device != ids.device:
            dispatch.refuse(f"{name}[{i}]", f"is on {buffer.device}, ids are on {ids.device}")


def gather_rows(
    ids: Tensor, tables: Sequence[Tensor], *, out: Sequence[Tensor] | None = None, impl: str | None = None
) -> list[Tensor]:
    """Rows of one or two tables, side by side in new or given buffers.

    Args:
        ids: int32 or int64 [n], contiguous, in any order and as often as liked; -1 gives a row of zeros.
        tables: one or two of [r, d], contiguous, fp32, fp16 or bf16 (float64 on the torch path), on the device of the
            ids or, where that is a CUDA device, in page-locked host memory.
        out: a buffer [n, d] a table, of its dtype, contiguous, on the device of the ids; None: new ones.
        impl: "triton", "torch", or None: by the device of the ids.

    Returns:
        the buffers.

    Raises:
        ValueError: wrong dtype, shape or device, a table in pageable memory or not contiguous; on the CPU and in debug
            mode ids out of range.
    """
    tables = [table.detach() for table in tables]
    if out is None:
        # The checks of the tables come first, but none of them needs a buffer's data.
        shapes = [(*ids.shape, *table.shape[1:]) for table in tables]
        out = [dispatch.empty(s, t.dtype, ids.device) for s, t in zip(shapes, tables, strict=True)]
    out = list(out)
    _check(ids, tables, out, "out")
    if dispatch.at_once(ids):
        _copy(ids, tables, out, False, impl)
    else:
        _gather_op(ids, tables, out, impl)
    return out


def scatter_rows(ids: Tensor, rows: Sequence[Tensor], tables: Sequence[Tensor], *, impl: str | None = None) -> None:
    """Write rows into one or two tables, in place; `tables[i][ids] = rows[i]`.

    Args:
        ids: int32 or int64 [n], contiguous, distinct; rows of -1 are left out.
        rows: [n, d] a table, of its dtype, contiguous, on the device of the ids.
        tables: as in `gather_rows`.
        impl: "triton", "torch", or None: by the device of the ids.

    Raises:
        ValueError: as `gather_rows`; in debug mode ids that are not distinct.
    """
    _check(ids, tables, rows, "rows")
    _scatter_op(ids, [x.detach() for x in rows], [table.detach() for table in tables], impl)
