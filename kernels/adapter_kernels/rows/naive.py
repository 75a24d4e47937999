"""What the ops of this folder compute, as plainly as possible: the oracles of their tests. Unions are Python sets."""

from __future__ import annotations

import torch
from torch import Tensor


def load_of(ids: Tensor, r: int, E: int, valid: Tensor | None = None) -> Tensor:
    """Picks of each of E groups of r / E rows, int64 [E]."""
    load = torch.zeros(E, dtype=torch.int64, device=ids.device)
    for i in (ids if valid is None else ids[valid]).flatten().tolist():
        if 0 <= i < r:
            load[i // (r // E)] += 1
    return load


def row_union(ids: Tensor, r: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The distinct ids in ascending order, int32 [u], and of each pick its place among them, -1 where not valid."""
    picks = ids.tolist()
    alive = [[0 <= i < r for i in row] for row in picks]
    if valid is not None:
        alive = [[a and v for a, v in zip(*rows, strict=True)] for rows in zip(alive, valid.tolist(), strict=True)]
    union = sorted({i for row, used in zip(picks, alive, strict=True) for i, a in zip(row, used, strict=True) if a})
    place = {i: n for n, i in enumerate(union)}
    position = [
        [place[i] if a else -1 for i, a in zip(row, used, strict=True)] for row, used in zip(picks, alive, strict=True)
    ]
    return ids.new_tensor(union, dtype=torch.int32), ids.new_tensor(position, dtype=torch.int32).reshape(ids.shape)


def gather_rows(ids: Tensor, table: Tensor) -> Tensor:
    """table[ids], zeros for -1."""
    return torch.stack([table[i] if i >= 0 else torch.zeros_like(table[0]) for i in ids.tolist()])


def scatter_rows(ids: Tensor, rows: Tensor, table: Tensor) -> Tensor:
    """A copy of the table with table[ids] = rows; -1 is left out."""
    table = table.clone()
    for i, row in zip(ids.tolist(), rows, strict=True):
        if i >= 0:
            table[i] = row
    return table
