"""The kernel of `gather_rows` and `scatter_rows`, and its launch: a few programs that copy rows of one or two tables.

Source: the pattern of vLLM, v1/kv_offload (a few programs that read pinned memory saturate PCIe).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime import dispatch
from ..runtime import launch_config as launch
from ..runtime.specialisation import TYPE_NAMES, Specialisation, split
from ..runtime.triton_shim import kernel, tl, triton

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


def copy_rows(ids: Tensor, sources: Sequence[Tensor], targets: Sequence[Tensor], r: int, scatter: bool) -> None:
    """Launch it for at least one row and column; `r`: rows of a table."""
    unit = _unit(sources[0].shape[1], sources[0].dtype)
    if unit == 1 and len(sources) > 1:  # the addresses of narrow loads from two tables would fill the registers
        for source, target in zip(sources, targets, strict=True):
            copy_rows(ids, [source], [target], r, scatter)
        return
    config = _COPY.on(ids.device)
    on_host, on_device = config.pop("HOST_PROGRAMS"), config.pop("DEVICE_PROGRAMS")
    programs = on_device if all(x.device == ids.device for x in (*sources, *targets)) else on_host
    second = (sources[1], targets[1]) if len(sources) > 1 else (None, None)
    with dispatch.device_guard(ids.device):
        _copy_rows_kernel[(min(programs, triton.cdiv(len(ids), config["BM"])),)](
            dispatch.int32(ids), sources[0], targets[0], *second, len(ids), r, sources[0].shape[1] // unit,
            SCATTER=scatter, TWO=len(sources) > 1, UNIT=unit, **config,
        )  # fmt: skip


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
