"""The picks of neurons at a cost of E + P k dot products a token, where `routing.reference` computes all r."""

from __future__ import annotations

from torch import Tensor

from adapter_kernels import expert_topk, router_topk

from ..config import MEFTConfig


def select_neurons(x: Tensor, logits: Tensor, keys: Tensor, config: MEFTConfig) -> tuple[Tensor, Tensor]:
    """The neurons of each token, where the keys are: the `top_k` with the largest positive scores.

    Args:
        x: [T, d]. logits: W_g x, [T, E]. keys: [r, d], on x's device, of x's dtype or a narrower one.

    Returns:
        ids, int32 [T, K], -1 where there are fewer, and their x . w, [T, K]; K is at most `top_k`.
    """
    experts, factors = router_topk(logits, config.probed)
    most = min(config.top_k, experts.shape[1] * (len(keys) // logits.shape[1]))
    ids, _, dots = expert_topk(
        x, keys, experts, factors if config.router_factor else None, most, E=logits.shape[1], by_neuron=False
    )
    return ids, dots
