"""One optimizer step of rows whose moments are narrower than float32, in torch operations.

The same operations in the same order as meft's narrow_moments.h, each rounded by itself: both give the same bits. A
step is computed in float32 from the moments that are read; new ones are rounded stochastically, since to the nearest a
second moment of a long memory would never move from one code to the next. No step is larger than exact moments allow.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .moment_codes import decode_first, decode_root, encode_first, encode_root
from .row_state import Corrections, RowState, StepRule
from .square_root import square_root
from .stochastic_rounding import BITS, noise_of, rounded, row_keys, second_noise, third_noise

_LANES = 64  # sums of squares, added up as in narrow_moments.h


def step(
    state: RowState, rows: Tensor, grads: Tensor, rule: StepRule, corrections: Corrections, touches: Tensor, seed: int,
    ids: Tensor,
) -> None:  # fmt: skip
    """Step some rows, int64 [n], by their gradients [n, d]; ids: int64 [n], what the noise is made of."""
    table = state.table
    noise = noise_of(row_keys(ids, touches, seed), table.shape[1])
    step_size, inverse2, limit = (
        x.to(torch.float32).unsqueeze(1) for x in (corrections.step_size, corrections.inverse2, corrections.limit)
    )
    p, g = table.index_select(0, rows).to(torch.float32), grads.to(torch.float32)
    if rule.coupled:
        g = p * rule.coupled + g
    m = _read(state, "exp_avg", rows, decode_first)
    m = (g if rule.from_grad else m) + (g - m) * rule.mix
    v = _read(state, "exp_avg_sq", rows, decode_root)
    if state.mode == "float8":
        v = v * v
    fresh = _mean_square(g) * (1 - rule.beta2) if state.mode == "rowwise" else (g * (1 - rule.beta2)) * g
    v = v * rule.beta2 + fresh
    root = square_root(v)
    if state.mode == "rowwise":
        change = m * (step_size / (root.unsqueeze(1) * inverse2 + rule.eps))
    else:
        change = (m * step_size) / (root * inverse2 + rule.eps)
    p = p * rule.decay - torch.maximum(torch.minimum(change, limit), -limit)
    for name, value in _kept(state.mode, m, v, root, noise).items():
        getattr(state, name).index_copy_(0, rows, value)
    table.index_copy_(0, rows, p if table.dtype == torch.float32 else rounded(p, noise & BITS))
    if state.compute_copy is not None:
        state.compute_copy.index_copy_(0, rows, p.to(state.compute_copy.dtype))


def _read(state: RowState, name: str, rows: Tensor, decode: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A moment of some rows in float32; of codes what they stand for."""
    kept = getattr(state, name).index_select(0, rows)
    if state.mode != "float8":
        return kept.to(torch.float32)
    return decode(kept, getattr(state, f"{name}_scale").index_select(0, rows))


def _kept(mode: str, m: Tensor, v: Tensor, root: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """What is written of new moments, by its name in `RowState`."""
    second, third = second_noise(noise), third_noise(noise)
    if mode == "float8":
        codes, scales = encode_first(m, second)
        root_codes, root_scales = encode_root(root, third)
        moments = {"exp_avg": codes, "exp_avg_sq": root_codes}
        return {**moments, "exp_avg_scale": scales, "exp_avg_sq_scale": root_scales}
    return {"exp_avg": rounded(m, second), "exp_avg_sq": v if mode == "rowwise" else rounded(v, third)}


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
