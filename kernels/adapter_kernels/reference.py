"""What the ops compute, written as plainly as possible: the oracles of their tests, in any floating dtype.

Nothing here is fast or small: scores of all neurons are materialised, unions are made by Python sets.
"""

from __future__ import annotations

import torch
from torch import Tensor


def router_topk(logits: Tensor, P: int) -> tuple[Tensor, Tensor]:
    """Experts int32 [T, P] by descending logit, ties to the lower, NaN before all; and their logits [T, P]."""
    order = torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :P]
    return order.to(torch.int32), logits.gather(1, order)


def expert_scores(x: Tensor, keys: Tensor, experts: Tensor, factors: Tensor | None, E: int) -> tuple[Tensor, Tensor]:
    """Scores p_e (x . w) of all neurons, -inf where the expert is not probed; and the bare dots x . w; both [T, r]."""
    each = len(keys) // E
    dots = x @ keys.T
    scores = torch.full_like(dots, -torch.inf)
    for t, row in enumerate(experts.tolist()):
        for j, expert in enumerate(row):
            if 0 <= expert < E:
                factor = 1 if factors is None else factors[t, j]
                mine = slice(expert * each, (expert + 1) * each)
                scores[t, mine] = dots[t, mine] * factor
    return scores, dots


def expert_topk(
    x: Tensor, keys: Tensor, experts: Tensor, factors: Tensor | None, K: int, E: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids int32 [T, K] by descending score, ties to the lower id, -1 after the last positive one; scores; dots."""
    scores, dots = expert_scores(x, keys, experts, factors, E)
    scores = torch.where(scores > 0, scores, -torch.inf)  # NaN is not positive
    ids = x.new_full((len(x), K), -1, dtype=torch.int32)
    best, dot = (x.new_zeros(len(x), K) for _ in range(2))
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :K]
    for t, row in enumerate(order.tolist()):
        for j, neuron in enumerate(row):
            if scores[t, neuron] > 0:
                ids[t, j], best[t, j], dot[t, j] = neuron, scores[t, neuron], dots[t, neuron]
    return ids, best, dot


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


def row_adamw(
    p: Tensor,
    m: Tensor,
    v: Tensor,
    touches: int,
    g: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    decoupled: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """A row and its moments after its touch number `touches`, from 1."""
    g = g if decoupled else g + decay * p
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    p = p * (1 - lr * decay) if decoupled else p
    step = lr * (m / (1 - betas[0] ** touches)) / ((v / (1 - betas[1] ** touches)).sqrt() + eps)
    return p - step, m, v
