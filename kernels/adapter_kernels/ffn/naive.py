"""What the sparse FFN computes, written as plainly as possible: the oracle of its tests, in any floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def sparse_ffn(x: Tensor, keys: Tensor, values: Tensor, position: Tensor, factors: Tensor | None) -> Tensor:
    """The sum of ReLU(factor * (x . key)) * value over each token's picks; autograd makes the gradient."""
    y = []
    for t, picks in enumerate(position.tolist()):
        live = [j for j, row in enumerate(picks) if row >= 0]
        rows = [picks[j] for j in live]
        scores = keys[rows] @ x[t]
        y.append(torch.relu(scores if factors is None else scores * factors[t, live]) @ values[rows])
    return torch.stack(y)
