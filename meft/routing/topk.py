"""The picks of neurons at a cost of E + P k dot products a token, where `routing` computes all r."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_kernels import expert_topk, router_topk

from ..config import MEFTConfig


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


def best_neurons(
    x: Tensor, logits: Tensor, keys: Tensor, experts_per_token: int, top_k: int, factor: bool, *, by_neuron: bool
) -> tuple[Tensor, Tensor]:
    """The picks as a table; see `select_neurons`.

    Args:
        by_neuron: in ascending order within a token, among which any place may be empty.

    Returns:
        ids, int32 [T, K], -1 where there is none, and their x . w, [T, K]; K is at most top_k.
    """
    E = logits.shape[1]
    experts, factors = router_topk(logits, experts_per_token)
    most = min(top_k, experts_per_token * len(keys) // E)
    ids, _, dots = expert_topk(x, keys, experts, factors if factor else None, most, E=E, by_neuron=by_neuron)
    return ids, dots


def select_neurons(
    x: Tensor, logits: Tensor, keys: Tensor, *, experts_per_token: int, top_k: int, factor: bool
) -> Selection:
    """The picks of `routing.chosen_neurons`.

    Args:
        x: [T, d]. logits: W_g x, [T, E]. keys: [r, d], on x's device, of x's dtype or a narrower one.
        factor: whether scores are multiplied by the logit of the neuron's expert.
    """
    ids, dots = best_neurons(x, logits, keys, experts_per_token, top_k, factor, by_neuron=True)
    kept, most = ids >= 0, ids.shape[1]
    pick = kept.flatten().nonzero().flatten()
    neuron, dots = (column.flatten().index_select(0, pick) for column in (ids, dots))
    return Selection(_starts(kept.sum(1)), pick // most, neuron.to(torch.int64), dots)


def _starts(counts: Tensor) -> Tensor:
    starts = counts.new_zeros(len(counts) + 1)
    torch.cumsum(counts, 0, out=starts[1:])
    return starts


def union(neuron: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The distinct ones of some neurons, and where each is among them.

    Returns:
        int64 [u] ascending, and int64 like `neuron`.
    """
    used = torch.zeros(r, dtype=torch.bool, device=neuron.device)
    used[neuron] = True
    place = used.cumsum(0) - 1
    return used.nonzero().flatten(), place[neuron]


def picked_neurons(x: Tensor, logits: Tensor, keys: Tensor, config: MEFTConfig) -> Tensor:
    """Ids of the neurons of each token, int32 [T, K], -1 where there are fewer; computed where the keys are.

    Args:
        x: [T, d]. logits: W_g x, [T, E]. keys: [r, d].
    """
    return best_neurons(x, logits, keys, config.probed, config.top_k, config.router_factor, by_neuron=False)[0]
