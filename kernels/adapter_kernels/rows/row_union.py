"""The distinct rows that a micro-batch picked, in ascending order, and the place of each pick among them.

    rows = sorted({ids[t, j] : valid[t, j], 0 <= ids[t, j] < r});   rows[position[t, j]] = ids[t, j], -1 if not valid

`row_union` returns rows of exactly that length, for which the host must read the count: its only synchronisation.
`row_union_window` needs none. It fills a buffer of fixed capacity with the part of the union that begins at `start`
and raises a flag on the device when more follows, which a further window has. Picks outside of the window have the
position -1 there, and each pick is in one window exactly: nothing is cut.

Integers only, no gradient, no sort (`row_union_triton`, `row_union_torch`). Limits: T K < 2^31, and r <=
2^20 in the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime import dispatch
from ..topk import host_topk
from . import row_union_torch, row_union_triton


def _check_values(ids: Tensor, valid: Tensor | None, r: int) -> None:
    outside = (ids < -1) | (ids >= r)
    if valid is not None:
        outside &= valid
    if bool(outside.any()):
        dispatch.refuse("ids", f"ids outside of -1 to r - 1 = {r - 1}")


def _union_window(
    ids: Tensor, valid: Tensor | None, load: Tensor | None, r: int, start: int, capacity: int, impl: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if dispatch.debug():
        _check_values(ids, valid, r)
    if dispatch.use_triton(impl, ids.device, row_union_triton.unsupported(r)):
        return row_union_triton.union_window(ids, valid, load, r, start, capacity)
    made = host_topk.row_union(ids, load, r, start, capacity) if impl is None and valid is None else None
    return made or row_union_torch.union_window(ids, valid, load, r, start, capacity)


_window_op = torch.library.custom_op("adapter_kernels::row_union_window", mutates_args=("load",))(_union_window)


@_window_op.register_fake
def _(
    ids: Tensor, valid: Tensor | None, load: Tensor | None, r: int, start: int, capacity: int, *_: object
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
    rows, count, _, position = _union_window(ids, valid, None, r, 0, min(r, ids.numel()), impl)
    return rows[: int(count)], position


@_op.register_fake
def _(ids: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    u = torch.library.get_ctx().new_dynamic_size()
    return ids.new_empty(u, dtype=torch.int32), ids.new_empty(ids.shape, dtype=torch.int32)


def _check(ids: Tensor, valid: Tensor | None, r: int) -> None:
    dispatch.require_matrix(ids, "ids", dispatch.INTS)
    if not (ids.numel() < 1 << 31):
        dispatch.refuse("ids", "2^31 picks or more")
    if not (0 <= r < 1 << 31):
        dispatch.refuse("r", f"0 to 2^31 - 1 is needed, not {r}")
    if valid is not None:
        if valid.dtype != torch.bool:
            dispatch.refuse("valid", f"torch.bool is needed, not {valid.dtype}")
        if valid.shape != ids.shape:
            dispatch.refuse("valid", f"shape {tuple(valid.shape)}, ids {tuple(ids.shape)}")
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
        if load.dtype != torch.int64:
            dispatch.refuse("load", f"torch.int64 is needed, not {load.dtype}")
        if load.ndim != 1 or not load.is_contiguous():
            dispatch.refuse("load", "one contiguous dimension is needed")
        if not (len(load) > 0 and r % len(load) == 0):
            dispatch.refuse("load", f"{len(load)} groups do not divide {r} rows")
        dispatch.require_same_device(ids=ids, load=load)
    if capacity < 1:
        dispatch.refuse("capacity", f"at least 1 is needed, not {capacity}")
    if start < 0:
        dispatch.refuse("start", f"at least 0 is needed, not {start}")
    run = _union_window if dispatch.at_once(ids) else _window_op
    return run(ids, valid, load, r, start, capacity, impl)
