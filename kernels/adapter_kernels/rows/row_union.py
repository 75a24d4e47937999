"""The distinct rows that a micro-batch picked, in ascending order, and the place of each pick among them.

    rows = sorted({ids[t, j] : valid[t, j], 0 <= ids[t, j] < r});   rows[position[t, j]] = ids[t, j], -1 if not valid

`row_union` returns rows of exactly that length, for which the host must read the count: its only synchronisation.
`row_union_window` needs none. It fills a buffer of fixed capacity with the part of the union that begins at `start`
and raises a flag on the device when more follows, which a further window has. Picks outside of the window have the
position -1 there, and each pick is in one window exactly: nothing is cut.

Integers only, no gradient. No sort either: a mark for each of the r rows, then a prefix sum over the marks.
1. `mark`: marks[id] = 1 for each valid pick. Programs that write one mark write the same byte, so no atomics there.
   Where picks are counted by groups of rows, it adds them up: atomics, but of integers, in whose order nothing lies.
2. `number`: a program takes a block of rows, adds up the marks before it and then its own, and writes the rows of the
   window. Reading all earlier marks in each program costs r^2 / (2 BLOCK) bytes of L2 reads (36 KB at r 8464) and
   saves a second launch for the sums of the blocks.
3. `place`: position of each pick.

Limits: r <= 2^20 (the reads of `number` grow with r^2), T K < 2^31.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime import dispatch
from ..runtime import launch_config as launch
from ..runtime.specialisation import Specialisation, split, with_odd_rows
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
    ids_ptr, valid_ptr, marks_ptr, load_ptr, n, r, each,
    MASKED: tl.constexpr, COUNTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """marks[id] = 1; an id outside of 0 to r - 1 is no pick. load[id // each] += 1."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids_ptr + i, mask=i < n, other=-1)
    used = (row >= 0) & (row < r)
    if MASKED:
        used = used & (tl.load(valid_ptr + i, mask=i < n, other=0) != 0)
    tl.store(marks_ptr + row, tl.full((BLOCK,), 1, tl.int8), mask=used)
    if COUNTED:
        tl.atomic_add(load_ptr + row // each, tl.full((BLOCK,), 1, tl.int64), mask=used, sem="relaxed")


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


def _triton(
    ids: Tensor, valid: Tensor | None, load: Tensor | None, r: int, start: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
    with dispatch.on(device):
        if n:
            each = r // len(load) if load is not None else 1
            _mark_kernel[(triton.cdiv(n, mark["BLOCK"]),)](
                ids, valid, marks, load, n, r, each, MASKED=valid is not None, COUNTED=load is not None, **mark
            )
        _number_kernel[(triton.cdiv(r, number["BLOCK"]),)](
            marks, places, rows, count, more, r, start, capacity, **number
        )
        if n:
            _place_kernel[(triton.cdiv(n, place["BLOCK"]),)](
                ids, valid, places, position, n, r, MASKED=valid is not None, **place
            )
    return rows, count, more, position


def _refusals(r: int) -> list[tuple[str, str]]:
    return [("r", f"at most {MAX_ROWS} rows are possible, not {r}")] if r > MAX_ROWS else []


def _torch(
    ids: Tensor, valid: Tensor | None, load: Tensor | None, r: int, start: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    used = (ids >= 0) & (ids < r)
    if valid is not None:
        used &= valid
    # Row r takes the picks that are none.
    chosen = ids.to(torch.int64).where(used, r).flatten()
    marks = torch.zeros(r + 1, dtype=torch.bool, device=ids.device).index_fill_(0, chosen, True)
    marks[r] = False
    if load is not None and len(load):
        each = r // len(load)
        load += torch.bincount(torch.div(chosen, each, rounding_mode="floor"), minlength=len(load) + 1)[: len(load)]
    places = marks.cumsum(0) - 1 - start
    inside = marks & (places >= 0) & (places < capacity)
    count = marks.sum(dtype=torch.int32).view(1)
    rows = torch.full((capacity,), -1, dtype=torch.int32, device=ids.device)
    found = inside.nonzero().flatten()
    rows[: len(found)] = found.to(torch.int32)
    position = places.where(inside, -1).to(torch.int32).index_select(0, chosen).view(ids.shape)
    return rows, count, (count - start > capacity).to(torch.int32), position


def _check_values(ids: Tensor, valid: Tensor | None, r: int) -> None:
    outside = (ids < -1) | (ids >= r)
    if valid is not None:
        outside &= valid
    dispatch.require(not bool(outside.any()), "ids", f"ids outside of -1 to r - 1 = {r - 1}")


@torch.library.custom_op("adapter_kernels::row_union_window", mutates_args=("load",))
def _window_op(
    ids: Tensor, valid: Tensor | None, load: Tensor | None, r: int, start: int, capacity: int, impl: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if dispatch.debug():
        _check_values(ids, valid, r)
    implementation = _triton if dispatch.use_triton(impl, ids.device, _refusals(r)) else _torch
    return implementation(ids, valid, load, r, start, capacity)


@_window_op.register_fake
def _(
    ids: Tensor, valid: Tensor | None, load: Tensor | None, r: int, start: int, capacity: int, impl: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new = ids.new_empty
    return (
        new(capacity, dtype=torch.int32),
        new(1, dtype=torch.int32),
        new(1, dtype=torch.int32),
        new(ids.shape, dtype=torch.int32),
    )


@torch.library.custom_op("adapter_kernels::row_union", mutates_args=())
def _op(ids: Tensor, valid: Tensor | None, r: int, impl: str | None) -> tuple[Tensor, Tensor]:
    if dispatch.debug():
        _check_values(ids, valid, r)
    implementation = _triton if dispatch.use_triton(impl, ids.device, _refusals(r)) else _torch
    rows, count, _, position = implementation(ids, valid, None, r, 0, min(r, ids.numel()))
    return rows[: int(count)], position


@_op.register_fake
def _(ids: Tensor, valid: Tensor | None, r: int, impl: str | None) -> tuple[Tensor, Tensor]:
    u = torch.library.get_ctx().new_dynamic_size()
    return ids.new_empty(u, dtype=torch.int32), ids.new_empty(ids.shape, dtype=torch.int32)


def _check(ids: Tensor, valid: Tensor | None, r: int) -> None:
    dispatch.require_matrix(ids, "ids", dispatch.INTS)
    dispatch.require(ids.numel() < 1 << 31, "ids", "2^31 picks or more")
    dispatch.require(0 <= r < 1 << 31, "r", f"0 to 2^31 - 1 is needed, not {r}")
    if valid is not None:
        dispatch.require(valid.dtype == torch.bool, "valid", f"torch.bool is needed, not {valid.dtype}")
        dispatch.require(valid.shape == ids.shape, "valid", f"shape {tuple(valid.shape)}, ids {tuple(ids.shape)}")
        dispatch.require_same_device(ids=ids, valid=valid)


def row_union(ids: Tensor, r: int, *, valid: Tensor | None = None, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """The distinct rows among some picks, and the place of each pick among them.

    Args:
        ids: int32 or int64 [T, K]; an id outside of 0 to r - 1 (-1 by custom) is no pick.
        r: number of rows of the table.
        valid: bool [T, K], False where there is no pick; None: all ids of 0 to r - 1 are.
        impl: "triton", "torch", or None: by the device of the ids.

    Returns:
        rows, int32 [u] ascending, and position, int32 [T, K], -1 where there is no pick. The host waits for u.

    Raises:
        ValueError: wrong dtype, shape or device, r past the limit; in debug mode ids outside of -1 to r - 1.
    """
    _check(ids, valid, r)
    return _op(ids, valid, r, impl)


def row_union_window(
    ids: Tensor,
    r: int,
    capacity: int,
    *,
    start: int = 0,
    valid: Tensor | None = None,
    load: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The entries `start` to `start + capacity - 1` of the union, without waiting for the device.

    Args:
        ids, r, valid, impl: as in `row_union`.
        capacity: length of the buffer, at least 1.
        start: first entry.
        load: int64 [E], E a divisor of r, to which the picks of each group of r/E rows are added; None: not counted.

    Returns:
        rows: int32 [capacity], ascending, -1 after the last entry.
        count: int32 [1], size of the whole union.
        more: int32 [1], 1 where entries follow after this window: fetch them with `start + capacity`.
        position: int32 [T, K], place within `rows`, -1 where the pick is none or in another window.

    Raises:
        ValueError: as `row_union`; capacity < 1 or start < 0; a load of another form.
    """
    _check(ids, valid, r)
    if load is not None:
        dispatch.require(load.dtype == torch.int64, "load", f"torch.int64 is needed, not {load.dtype}")
        dispatch.require(load.ndim == 1 and load.is_contiguous(), "load", "one contiguous dimension is needed")
        dispatch.require(len(load) > 0 and r % len(load) == 0, "load", f"{len(load)} groups do not divide {r} rows")
        dispatch.require_same_device(ids=ids, load=load)
    dispatch.require(capacity >= 1, "capacity", f"at least 1 is needed, not {capacity}")
    dispatch.require(start >= 0, "start", f"at least 0 is needed, not {start}")
    return _window_op(ids, valid, load, r, start, capacity, impl)


def variants(capability: int | None) -> list[Specialisation]:
    """What a launch can be: ids of both widths, with and without a mask, with and without picks that are counted."""
    found = []
    marked: dict[str, str] = {"marks_ptr": "*i8", "each": "i32"}
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
    return with_odd_rows(found)
