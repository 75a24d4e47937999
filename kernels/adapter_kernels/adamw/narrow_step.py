"""One optimizer step of rows whose moments are narrower than float32, in torch operations.

The same operations in the same order as meft's narrow_moments.h, each rounded by itself: both give the same bits. A
step is computed in float32 from the moments that are read; new ones are rounded stochastically, since to the nearest a
second moment of a long memory would never move from one code to the next. No step is larger than exact moments allow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .row_state import Corrections, RowState, StepRule
from .square_root import square_root
from .stochastic_rounding import BITS, noise_of, rounded, row_keys, second_noise, third_noise

_LANES = 64  # sums of squares, added up as in narrow_moments.h


def step(
    state: RowState, rows: Tensor, grads: Tensor, rule: StepRule, corrections: Corrections, touches: Tensor, seed: int
) -> None:
    """Step some rows, int64 [n], by their gradients [n, d]."""
    table = state.table
    noise = noise_of(row_keys(rows, touches, seed), table.shape[1])
    step_size, inverse2, limit = (
        x.to(torch.float32).unsqueeze(1) for x in (corrections.step_size, corrections.inverse2, corrections.limit)
    )
    p, g = table.index_select(0, rows).to(torch.float32), grads.to(torch.float32)
    if rule.coupled:
        g = p * rule.coupled + g
    m = state.exp_avg.index_select(0, rows).to(torch.float32)
    m = (g if rule.from_grad else m) + (g - m) * rule.mix
    v = state.exp_avg_sq.index_select(0, rows).to(torch.float32)
    if state.mode == "rowwise":
        v = v * rule.beta2 + _mean_square(g) * (1 - rule.beta2)
        root = square_root(v).unsqueeze(1)
        change = m * (step_size / (root * inverse2 + rule.eps))
        new_v = v
    else:
        v = v * rule.beta2 + (g * (1 - rule.beta2)) * g
        change = (m * step_size) / (square_root(v) * inverse2 + rule.eps)
        new_v = rounded(v, third_noise(noise))
    p = p * rule.decay - torch.maximum(torch.minimum(change, limit), -limit)
    state.exp_avg.index_copy_(0, rows, rounded(m, second_noise(noise)))
    state.exp_avg_sq.index_copy_(0, rows, new_v)
    table.index_copy_(0, rows, p if table.dtype == torch.float32 else rounded(p, noise & BITS))
    if state.compute_copy is not None:
        state.compute_copy.index_copy_(0, rows, p.to(state.compute_copy.dtype))


def _mean_square(g: Tensor) -> Tensor:
    """[n] of [n, d]: the mean of the squares of each row."""
    squares = g * g
    sums = torch.zeros(len(g), _LANES, dtype=torch.float32, device=g.device)
    for part in squares.split(_LANES, 1):
        sums[:, : part.shape[1]] += part
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums[:, 0] / g.shape[1]
