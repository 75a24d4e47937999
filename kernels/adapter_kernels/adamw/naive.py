"""What `row_adamw` computes, for one row and as plainly as possible: the oracle of its tests, in any floating dtype."""

from __future__ import annotations

from torch import Tensor


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
