"""The picks of neurons at a cost of E + P k dot products a token, where `routing` computes all r."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """The neurons that each of T tokens uses, as a ragged list.

    Attributes:
        starts: int64 [T + 1]; the picks of token t are starts[t] to starts[t + 1] - 1.
        token: int64 [n], the token of each pick, ascending.
        neuron: int64 [n], its neuron, ascending within a token.
        dots: [n], x . w_j of each pick as scored; None where the picks were not made by scores.
    """

    starts: Tensor
    token: Tensor
    neuron: Tensor
    dots: Tensor | None = None

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.starts) - 1

    def to(self, device: torch.device) -> Selection:
        """The same picks on a device."""
        dots = self.dots.to(device) if self.dots is not None else None
        return Selection(self.starts.to(device), self.token.to(device), self.neuron.to(device), dots)

    def nbytes(self) -> int:
        """Bytes of ids and scores."""
        tensors = (self.starts, self.neuron) if self.dots is None else (self.starts, self.neuron, self.dots)
        return sum(t.numel() * t.element_size() for t in tensors)


def largest_experts(logits: Tensor, n: int) -> Tensor:
    """The n experts with the largest logits of each token, int64 [T, n] ascending; ties go to the lower id."""
    if n == logits.shape[1]:
        return torch.arange(n, device=logits.device).expand(len(logits), n)
    return torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :n].sort(dim=1).values


def probed_dots(x: Tensor, experts: Tensor, keys: Tensor, num_experts: int) -> Tensor:
    """x . w of all neurons of the probed experts: tokens are grouped by expert, one small GEMM each.

    Args:
        x: [T, d]. experts: int64 [T, P] ascending. keys: [r, d], of any floating dtype.

    Returns:
        [T, P, k] of x's dtype, k = r / num_experts.
    """
    each = len(keys) // num_experts
    T, P = experts.shape
    if num_experts == P:
        return (x @ keys.to(x.dtype).T).view(T, P, each)
    flat = experts.reshape(-1)
    order = flat.argsort(stable=True)
    token = order // P
    grouped = x.new_empty(T * P, each)
    start = 0
    for expert, count in enumerate(torch.bincount(flat, minlength=num_experts).tolist()):
        if count:
            stop = start + count
            block = keys[expert * each : (expert + 1) * each].to(x.dtype)
            torch.mm(x.index_select(0, token[start:stop]), block.T, out=grouped[start:stop])
            start = stop
    dots = torch.empty_like(grouped)
    dots[order] = grouped
    return dots.view(T, P, each)


def select_neurons(
    x: Tensor, logits: Tensor, keys: Tensor, *, experts_per_token: int, top_k: int, factor: bool
) -> Selection:
    """The picks of `routing.chosen_neurons`.

    Args:
        x: [T, d]. logits: W_g x, [T, E]. keys: [r, d], on x's device.
        factor: whether scores are multiplied by the logit of the neuron's expert.
    """
    num_experts = logits.shape[1]
    each = len(keys) // num_experts
    experts = largest_experts(logits, experts_per_token)
    dots = probed_dots(x, experts, keys, num_experts)
    scores = dots * logits.gather(1, experts)[:, :, None] if factor else dots
    # Candidates stand in the order of their neurons, so that a stable sort gives ties to the lower id.
    scores, dots = scores.flatten(1), dots.flatten(1)
    kept = scores > 0
    if top_k < scores.shape[1]:
        order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :top_k]
        kept &= torch.zeros_like(kept).scatter_(1, order, True)
    token, candidate = kept.nonzero(as_tuple=True)
    neuron = experts[token, candidate // each] * each + candidate % each
    return Selection(_starts(kept.sum(1)), token, neuron, dots[kept])


def _starts(counts: Tensor) -> Tensor:
    starts = counts.new_zeros(len(counts) + 1)
    torch.cumsum(counts, 0, out=starts[1:])
    return starts


def shared_by_all(selection: Selection) -> Selection:
    """Every token uses what any token has picked (`routing="union"`)."""
    rows = selection.neuron.unique()
    T, n = selection.tokens, len(rows)
    token = torch.arange(T, device=rows.device).repeat_interleave(n)
    return Selection(torch.arange(T + 1, device=rows.device) * n, token, rows.repeat(T))


def union(neuron: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The distinct ones of some neurons, and where each is among them.

    Returns:
        int64 [u] ascending, and int64 like `neuron`.
    """
    used = torch.zeros(r, dtype=torch.bool, device=neuron.device)
    used[neuron] = True
    place = used.cumsum(0) - 1
    return used.nonzero().flatten(), place[neuron]
