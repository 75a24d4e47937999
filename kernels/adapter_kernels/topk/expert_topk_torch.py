"""The torch path of `expert_topk`: a product an expert in fp32 (float64 of float64), with no limits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .ordering import stable_topk


def select(
    x: Tensor, keys: Tensor, experts: Tensor, factors: Tensor | None, K: int, E: int, by_neuron: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """ids, scores and dots, [T, K], as `expert_topk` returns them."""
    P, neurons_per_expert = experts.shape[1], keys.shape[0] // E
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x = x.to(wide)
    # In ascending order, so that candidates stand in the order of their neurons, to the lower of which ties go.
    experts, slot = experts.where((experts >= 0) & (experts < E), E).sort(dim=1)
    dots = _expert_dots(x, keys, experts, E)
    scores = dots * factors.to(wide).gather(1, slot)[:, :, None] if factors is not None else dots
    scores = scores.nan_to_num(0.0, torch.inf, -torch.inf).relu_()
    offsets = torch.arange(neurons_per_expert, dtype=experts.dtype, device=x.device)
    neurons = (experts * neurons_per_expert)[:, :, None] + offsets
    columns = [scores.flatten(1), dots.flatten(1), neurons.flatten(1)]
    n = min(K, P * neurons_per_expert)
    if not by_neuron or n < P * neurons_per_expert:
        candidate = stable_topk(columns[0], n)
        candidate = candidate.sort(dim=1).values if by_neuron else candidate
        columns = [column.gather(1, candidate) for column in columns]
    scores, dots, neurons = columns
    used = scores > 0
    # x | (1 - 1) is x and x | (0 - 1) is -1: a tenth of what `where` takes.
    columns = [scores, dots.where(used, 0), (used.to(torch.int32) - 1).bitwise_or_(neurons.to(torch.int32))]
    if n < K:
        columns = [pad(column, (0, K - n), value=empty) for column, empty in zip(columns, (0, 0, -1), strict=True)]
    scores, dots, ids = columns
    return ids, scores, dots


def _expert_dots(x: Tensor, keys: Tensor, experts: Tensor, E: int) -> Tensor:
    """x . w of all neurons of the experts, ascending (E: of none), [T, P, r/E], in x's dtype.

    Tokens are grouped by expert, a small GEMM each; narrower keys are widened block by block, as in the kernel.
    """
    (T, P), neurons_per_expert = experts.shape, keys.shape[0] // E
    if P == E and bool((experts < E).all()):
        return (x @ keys.to(x.dtype).T).view(T, P, neurons_per_expert)
    if T == 1:  # in decoding, grouping would take as long as the products
        dots = x.new_zeros(1, P, neurons_per_expert)
        for p, expert in enumerate(experts[0].tolist()):
            if expert < E:
                block = keys[expert * neurons_per_expert : (expert + 1) * neurons_per_expert].to(x.dtype)
                torch.mm(x, block.T, out=dots[:, p])
        return dots
    flat = experts.flatten().to(torch.int64)
    order = flat.argsort(stable=True)
    token = order // P
    grouped = x.new_zeros(T * P, neurons_per_expert)
    start = 0
    for expert, count in enumerate(torch.bincount(flat, minlength=E)[:E].tolist()):
        if count:
            rows = slice(start, start + count)
            block = keys[expert * neurons_per_expert : (expert + 1) * neurons_per_expert].to(x.dtype)
            torch.mm(x.index_select(0, token[rows]), block.T, out=grouped[rows])
            start += count
    dots = torch.empty_like(grouped)
    dots[order] = grouped
    return dots.view(T, P, neurons_per_expert)
