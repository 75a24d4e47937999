"""The torch path of `row_union` and `row_union_window`: marks and a prefix sum, as in the kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def union_window(
    ids: Tensor, valid: Tensor | None, load: Tensor | None, r: int, start: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rows, count, more and position, as `row_union_window` returns them; picks are added to `load`."""
    used = (ids >= 0) & (ids < r)
    if valid is not None:
        used &= valid
    # Row r takes the picks that are none.
    chosen = ids.to(torch.int64).where(used, r).flatten()
    marks = torch.zeros(r + 1, dtype=torch.bool, device=ids.device).index_fill_(0, chosen, True)
    marks[r] = False
    if load is not None and len(load):
        group = torch.div(chosen, r // len(load), rounding_mode="floor")
        load += torch.bincount(group, minlength=len(load) + 1)[: len(load)]
    places = marks.cumsum(0) - 1 - start
    inside = marks & (places >= 0) & (places < capacity)
    count = marks.sum(dtype=torch.int32).view(1)
    rows = torch.full((capacity,), -1, dtype=torch.int32, device=ids.device)
    union = inside.nonzero().flatten()
    rows[: len(union)] = union.to(torch.int32)
    position = places.where(inside, -1).to(torch.int32).index_select(0, chosen).view(ids.shape)
    return rows, count, (count - start > capacity).to(torch.int32), position
