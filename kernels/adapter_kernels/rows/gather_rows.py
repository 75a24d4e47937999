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

Source: the pattern of vLLM, v1/kv_offload (a few programs that read pinned memory saturate PCIe).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ..runtime import dispatch
from ..runtime import launch_config as launch
from ..runtime import triton_shim as jit
from ..runtime.specialisation import TYPE_NAMES, Specialisation, split
from ..runtime.triton_shim import kernel, tl, triton

_log = logging.getLogger(__name__)

# Derived, not measured. PCIe 5.0 x16 carries 64 GB/s at some 1.5 microseconds a round trip, so 96 KiB must be under
# way. A program has BM rows of BN values at once, 16 KiB at 2 bytes: 12 of them have 192 KiB, enough where half of them
# wait at their stores, and occupy at most 12 of 82 to 132 multiprocessors, so that a GEMM beside them keeps most of its
# own. DEVICE_PROGRAMS: 3 TB/s at 0.6 microseconds needs 1.8 MB under way; 512 have 8 MiB.
_COPY = launch.Table(
    "gather_rows.copy",
    {"BM": 4, "BN": 2048, "HOST_PROGRAMS": 12, "DEVICE_PROGRAMS": 512, "num_warps": 8, "num_stages": 1},
)


@kernel()
def _copy_rows_kernel(
    ids_ptr, source_ptr, target_ptr, source2_ptr, target2_ptr, n, r, units,
    SCATTER: tl.constexpr, TWO: tl.constexpr, UNIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Persistent programs, BM rows a turn. A row has units * UNIT values; UNIT is what one load can take of it."""
    D = units.to(tl.int64) * UNIT
    for first in range(tl.program_id(0) * BM, n, tl.num_programs(0) * BM):
        k = first + tl.arange(0, BM)
        row = tl.load(ids_ptr + k, mask=k < n, other=-1).to(tl.int64)
        inside = (row >= 0) & (row < r)
        if SCATTER:
            source, target, written = k.to(tl.int64) * D, row * D, inside
        else:
            source, target, written = row * D, k.to(tl.int64) * D, k < n
        for done in range(0, units * UNIT, BN):
            c = done + tl.arange(0, BN)
            read = inside[:, None] & (c < units * UNIT)[None, :]
            write = written[:, None] & (c < units * UNIT)[None, :]
            # Both loads before either store: twice the bytes under way.
            value = tl.load(source_ptr + source[:, None] + c[None, :], mask=read, other=0.0)
            if TWO:
                value2 = tl.load(source2_ptr + source[:, None] + c[None, :], mask=read, other=0.0)
                tl.store(target2_ptr + target[:, None] + c[None, :], value2, mask=write)
            tl.store(target_ptr + target[:, None] + c[None, :], value, mask=write)


def _unit(columns: int, dtype: torch.dtype) -> int:
    """Values in a load of 16 bytes where rows are multiples of that, or else 1: two kernels a dtype."""
    wide = 16 // dtype.itemsize
    return wide if columns % wide == 0 else 1


def _launch(ids: Tensor, sources: Sequence[Tensor], targets: Sequence[Tensor], r: int, scatter: bool) -> None:
    unit = _unit(sources[0].shape[1], sources[0].dtype)
    if unit == 1 and len(sources) > 1:  # the addresses of narrow loads from two tables would fill the registers
        for source, target in zip(sources, targets, strict=True):
            _launch(ids, [source], [target], r, scatter)
        return
    config = _COPY.on(ids.device)
    on_host, on_device = config.pop("HOST_PROGRAMS"), config.pop("DEVICE_PROGRAMS")
    most = on_device if all(x.device == ids.device for x in (*sources, *targets)) else on_host
    second = (sources[1], targets[1]) if len(sources) > 1 else (None, None)
    with dispatch.on(ids.device):
        _copy_rows_kernel[(min(most, triton.cdiv(len(ids), config["BM"])),)](
            dispatch.int32(ids), sources[0], targets[0], *second, len(ids), r, sources[0].shape[1] // unit,
            SCATTER=scatter, TWO=len(sources) > 1, UNIT=unit, **config,
        )  # fmt: skip


@cache
def _host_memory_reachable(device: torch.device) -> bool:
    """Whether kernels on a CUDA device can read and write page-locked host memory; tried with one row, once."""
    try:
        if not jit.AVAILABLE:
            raise RuntimeError("triton is not installed")
        with dispatch.on(device):  # page-locking makes a context on the current device
            table = torch.arange(64, dtype=torch.float32, device="cpu").view(1, 64).pin_memory()
        if table.is_pinned():
            ids = torch.zeros(1, dtype=torch.int32, device=device)
            out = torch.empty(1, 64, device=device)
            _launch(ids, [table], [out], 1, False)
            _launch(ids, [out + 1], [table], 1, True)
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
    dispatch.require(reachable, argument, f"is on {tensor.device}, but the ids are on {device}")


def zero_copy(device: torch.device, **tensors: Tensor | None) -> bool:
    """Whether kernels on `device` can take these tensors; nothing to ask where all are on the device.

    Raises:
        ValueError: one is on another device or in pageable host memory.
    """
    elsewhere = {name: x for name, x in tensors.items() if x is not None and x.device != device}
    for name, x in elsewhere.items():
        require_reachable(x, name, device)
        dispatch.require(x.is_pinned(), name, "is in pageable host memory, which a GPU cannot read; page-lock it")
    return not elsewhere or _host_memory_reachable(device)


def _require_in_range(ids: Tensor, r: int) -> bool:
    """Whether there is a -1 among the ids."""
    low, high = (int(x) for x in ids.aminmax()) if len(ids) else (0, -1)
    dispatch.require(low >= -1 and high < r, "ids", f"-1 to {r - 1} are possible, not {low if low < -1 else high}")
    return low < 0


def _gather_torch(ids: Tensor, table: Tensor, out: Tensor) -> None:
    if table.device != ids.device:
        staged = torch.empty(out.shape, dtype=out.dtype, device=table.device, pin_memory=ids.is_cuda)
        _gather_torch(ids.to(table.device), table, staged)
        # Not non_blocking: the staging buffer ends with this call.
        out.copy_(staged)
        return
    if _require_in_range(ids, len(table)):
        absent = ids < 0
        if len(table):
            torch.index_select(table, 0, ids.clamp(min=0), out=out)
        out.masked_fill_(absent[:, None], 0)
    elif len(ids):
        torch.index_select(table, 0, ids, out=out)


def _scatter_torch(ids: Tensor, rows: Tensor, table: Tensor) -> None:
    ids, rows = ids.to(table.device, torch.int64), rows.to(table.device)
    if _require_in_range(ids, len(table)):
        ids, rows = ids[ids >= 0], rows[ids >= 0]
    table.index_copy_(0, ids, rows)


def _copy(ids: Tensor, sources: list[Tensor], targets: list[Tensor], scatter: bool, impl: str | None) -> None:
    tables = targets if scatter else sources
    reachable = zero_copy(ids.device, **{f"tables[{i}]": table for i, table in enumerate(tables)})
    if dispatch.debug():
        _require_in_range(ids, len(tables[0]))
        used = ids[ids >= 0]
        distinct = not scatter or len(used.unique()) == len(used)
        dispatch.require(distinct, "ids", "a row is written twice; which one stays is not defined")
    if dispatch.use_triton(impl, ids.device, dispatch.half_or_single(**{"tables[0]": tables[0]})) and reachable:
        if len(ids) and tables[0].shape[1]:
            _launch(ids, sources, targets, len(tables[0]), scatter)
        return
    for source, target in zip(sources, targets, strict=True):
        (_scatter_torch if scatter else _gather_torch)(ids, source, target)


@torch.library.custom_op("adapter_kernels::gather_rows", mutates_args=("out",))
def _gather_op(ids: Tensor, tables: list[Tensor], out: list[Tensor], impl: str | None) -> None:
    _copy(ids, tables, out, False, impl)


@torch.library.custom_op("adapter_kernels::scatter_rows", mutates_args=("tables",))
def _scatter_op(ids: Tensor, rows: list[Tensor], tables: list[Tensor], impl: str | None) -> None:
    _copy(ids, rows, tables, True, impl)


@_gather_op.register_fake
def _(ids: Tensor, tables: list[Tensor], out: list[Tensor], impl: str | None) -> None:
    return


@_scatter_op.register_fake
def _(ids: Tensor, rows: list[Tensor], tables: list[Tensor], impl: str | None) -> None:
    return


def _check(ids: Tensor, tables: Sequence[Tensor], compact: Sequence[Tensor], name: str) -> None:
    dispatch.require(ids.dim() == 1, "ids", f"one dimension is needed, not the shape {tuple(ids.shape)}")
    dispatch.require(ids.dtype in dispatch.INTS, "ids", f"int32 or int64 is needed, not {ids.dtype}")
    dispatch.require(ids.is_contiguous(), "ids", "contiguous ids are needed")
    dispatch.require(1 <= len(tables) <= 2, "tables", f"one or two are needed, not {len(tables)}")
    dispatch.require(len(compact) == len(tables), name, f"{len(compact)} buffers for {len(tables)} tables")
    for i, table in enumerate(tables):
        dispatch.require_matrix(table, f"tables[{i}]", dispatch.FLOATS)
        dispatch.require(table.is_contiguous(), f"tables[{i}]", "a contiguous table is needed")
        same = table.shape == tables[0].shape and table.dtype == tables[0].dtype
        dispatch.require(same, f"tables[{i}]", "another shape or dtype than tables[0]")
        require_reachable(table, f"tables[{i}]", ids.device)
    for i, buffer in enumerate(compact):
        shape = (len(ids), tables[0].shape[1])
        fits = tuple(buffer.shape) == shape and buffer.dtype == tables[0].dtype and buffer.is_contiguous()
        dispatch.require(fits, f"{name}[{i}]", f"contiguous {tables[0].dtype} {shape} is needed")
        dispatch.require(buffer.device == ids.device, f"{name}[{i}]", f"is on {buffer.device}, ids are on {ids.device}")


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


def variants(capability: int | None) -> list[Specialisation]:
    """What a launch can be: both directions, one or two tables, every dtype, rows of whole 16 bytes and others."""
    blocks, options = split(_COPY.at(capability))
    blocks = {name: blocks[name] for name in ("BM", "BN")}
    found = []
    for dtype, name in TYPE_NAMES.items():
        for scatter in (False, True):
            for two, unit in ((False, 16 // dtype.itemsize), (True, 16 // dtype.itemsize), (False, 1)):
                pointers = ["source_ptr", "target_ptr"] + (["source2_ptr", "target2_ptr"] if two else [])
                types = {"ids_ptr": "*i32", "n": "i32", "r": "i32", "units": "i32"}
                types |= dict.fromkeys(pointers, f"*{name}")
                constants = blocks | {"SCATTER": scatter, "TWO": two, "UNIT": unit}
                constants |= {} if two else {"source2_ptr": None, "target2_ptr": None}
                found.append(Specialisation(_copy_rows_kernel, types, constants, options, wide=unit > 1))
    return found
