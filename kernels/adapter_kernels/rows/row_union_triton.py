"""The three kernels of `row_union` and `row_union_window`, and their launches.

No sort: a mark for each of the r rows, then a prefix sum over the marks.
1. `mark`: marks[id] = 1 for each valid pick. Programs that write one mark write the same byte, so no atomics there.
   Where picks are counted by groups of rows, it adds them up: atomics, but of integers, in whose order nothing lies.
2. `number`: a program takes a block of rows, adds up the marks before it and then its own, and writes the rows of the
   window. Reading all earlier marks in each program costs r^2 / (2 BLOCK) bytes of L2 reads (36 KB at r 8464) and
   saves a second launch for the sums of the blocks.
3. `place`: position of rows_per_group pick.

Limit: r <= 2^20 (the reads of `number` grow with r^2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime import dispatch
from ..runtime import launch_config as launch
from ..runtime.specialisation import Specialisation, split, with_unaligned_rows
from ..runtime.triton_shim import kernel, tl, triton

MAX_ROWS = 1 << 20

# Derived, not measured: the picks of T 512, K 64 are 32 programs of 1024, enough for the device to be busy and for each
# lane to read 16 bytes twice.
_MARK = launch.Table("row_union.mark", {"BLOCK": 1024, "num_warps": 4, "num_stages": 1})
_PLACE = launch.Table("row_union.place", {"BLOCK": 1024, "num_warps": 4, "num_stages": 1})
# Derived, not measured: 9 programs at r 8464; the last one reads 8 blocks of marks before its own. 4 marks a lane: with
# 8 the compiler of triton 3.6 spills on sm_90.
_NUMBER = launch.Table("row_union.number", {"BLOCK": 1024, "num_warps": 8, "num_stages": 1})


@kernel("n")
def _mark_kernel(
    ids_ptr, valid_ptr, marks_ptr, load_ptr, n, r, rows_per_group,
    MASKED: tl.constexpr, COUNTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """marks[id] = 1; an id outside of 0 to r - 1 is no pick. load[id // rows_per_group] += 1."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids_ptr + i, mask=i < n, other=-1)
    used = (row >= 0) & (row < r)
    if MASKED:
        used = used & (tl.load(valid_ptr + i, mask=i < n, other=0) != 0)
    tl.store(marks_ptr + row, tl.full((BLOCK,), 1, tl.int8), mask=used)
    if COUNTED:
        tl.atomic_add(load_ptr + row // rows_per_group, tl.full((BLOCK,), 1, tl.int64), mask=used, sem="relaxed")


@kernel("capacity")
def _number_kernel(
    marks_ptr, places_ptr, rows_ptr, count_ptr, more_ptr, r, start, capacity, BLOCK: tl.constexpr
):  # fmt: skip
    """places[row] = its place in the window, -1 outside; rows[place] = row, and -1 after the last."""
    block = tl.program_id(0)
    b = tl.arange(0, BLOCK)
    before = 0
    for i in range(0, block):
        before += tl.sum(tl.load(marks_ptr + i * BLOCK + b).to(tl.int32), 0)
    row = block * BLOCK + b
    mark = tl.load(marks_ptr + row, mask=row < r, other=0).to(tl.int32)
    place = before + tl.cumsum(mark, 0) - 1 - start
    inside = (mark != 0) & (place >= 0) & (place < capacity)
    tl.store(rows_ptr + place, row, mask=inside)
    tl.store(places_ptr + row, tl.where(inside, place, -1), mask=row < r)
    if block == tl.num_programs(0) - 1:
        count = before + tl.sum(mark, 0)
        tl.store(count_ptr, count)
        tl.store(more_ptr, (count - start > capacity).to(tl.int32))
        for i in range(tl.maximum(count - start, 0), capacity, BLOCK):
            tl.store(rows_ptr + i + b, tl.full((BLOCK,), -1, tl.int32), mask=i + b < capacity)


@kernel("n")
def _place_kernel(ids_ptr, valid_ptr, places_ptr, position_ptr, n, r, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """position[i] = places[ids[i]]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids_ptr + i, mask=i < n, other=-1)
    used = (row >= 0) & (row < r)
    if MASKED:
        used = used & (tl.load(valid_ptr + i, mask=i < n, other=0) != 0)
    tl.store(position_ptr + i, tl.load(places_ptr + row, mask=used, other=-1), mask=i < n)


def union_window(
    ids: Tensor, valid: Tensor | None, load: Tensor | None, r: int, start: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rows, count, more and position, as `row_union_window` returns them; picks are added to `load`."""
    device, n = ids.device, ids.numel()
    ids = ids.contiguous()
    valid = valid.contiguous().view(torch.int8) if valid is not None else None
    rows = dispatch.empty((capacity,), torch.int32, device)
    count = dispatch.empty((1,), torch.int32, device)
    more = dispatch.empty((1,), torch.int32, device)
    position = dispatch.empty(ids.shape, torch.int32, device)
    if r == 0:
        return rows.fill_(-1), count.zero_(), more.zero_(), position.fill_(-1)
    marks = dispatch.empty((r,), torch.int8, device).zero_()
    places = dispatch.empty((r,), torch.int32, device)
    mark, number, place = _MARK.on(device), _NUMBER.on(device), _PLACE.on(device)
    with dispatch.device_guard(device):
        if n:
            rows_per_group = r // len(load) if load is not None else 1
            _mark_kernel[(triton.cdiv(n, mark["BLOCK"]),)](
                ids, valid, marks, load, n, r, rows_per_group,
                MASKED=valid is not None, COUNTED=load is not None, **mark,
            )  # fmt: skip
        _number_kernel[(triton.cdiv(r, number["BLOCK"]),)](
            marks, places, rows, count, more, r, start, capacity, **number
        )
        if n:
            _place_kernel[(triton.cdiv(n, place["BLOCK"]),)](
                ids, valid, places, position, n, r, MASKED=valid is not None, **place
            )
    return rows, count, more, position


def unsupported(r: int) -> list[tuple[str, str]]:
    """What the kernels do not take: the argument, and why."""
    return [("r", f"at most {MAX_ROWS} rows are possible, not {r}")] if r > MAX_ROWS else []


def variants(capability: int | None) -> list[Specialisation]:
    """What a launch can be: ids of both widths, with and without a mask, with and without picks that are counted."""
    found = []
    marked: dict[str, str] = {"marks_ptr": "*i8", "rows_per_group": "i32"}
    for table, function, extra, more in (
        (_MARK, _mark_kernel, marked, {"COUNTED": False, "load_ptr": None}),
        (_MARK, _mark_kernel, marked | {"load_ptr": "*i64"}, {"COUNTED": True}),
        (_PLACE, _place_kernel, {"places_ptr": "*i32", "position_ptr": "*i32"}, {}),
    ):
        blocks, options = split(table.at(capability))
        for ids in ("*i32", "*i64"):
            for masked in (False, True):
                types = {"ids_ptr": ids, "n": "i32", "r": "i32"} | extra | ({"valid_ptr": "*i8"} if masked else {})
                constants = blocks | {"MASKED": masked} | ({} if masked else {"valid_ptr": None}) | more
                found.append(Specialisation(function, types, constants, options, wide=True))
    blocks, options = split(_NUMBER.at(capability))
    types = {"marks_ptr": "*i8", "places_ptr": "*i32", "rows_ptr": "*i32", "count_ptr": "*i32", "more_ptr": "*i32"}
    types |= dict.fromkeys(("r", "start", "capacity"), "i32")
    found.append(Specialisation(_number_kernel, types, blocks, options))
    return with_unaligned_rows(found)
