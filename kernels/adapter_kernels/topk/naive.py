"""What the ops of this folder compute, as plainly as possible: the oracles of their tests, in any floating dtype.

Scores of all neurons are materialised.
"""

from __future__ import annotations

import torch
from torch import Tensor


def router_topk(logits: Tensor, P: int) -> tuple[Tensor, Tensor]:
    """Experts int32 [T, P] by descending logit, ties to the lower, NaN before all; and their logits [T, P]."""
    order = torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :P]
    return order.to(torch.int32), logits.gather(1, order)


def expert_scores(x: Tensor, keys: Tensor, experts: Tensor, factors: Tensor | None, E: int) -> tuple[Tensor, Tensor]:
    """Scores p_e (x . w) of all neurons, -inf outside of a token's experts; and the bare dots x . w; both [T, r]."""
    neurons_per_expert = len(keys) // E
    dots = x @ keys.T
    scores = torch.full_like(dots, -torch.inf)
    for t, used in enumerate(experts.tolist()):
        for j, expert in enumerate(used):
            if 0 <= expert < E:
                factor = 1 if factors is None else factors[t, j]
                rows = slice(expert * neurons_per_expert, (expert + 1) * neurons_per_expert)
                scores[t, rows] = dots[t, rows] * factor
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
