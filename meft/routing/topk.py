"""The picks of neurons at a cost of E + P k dot products a token, where `routing.reference` computes all r."""

from __future__ import annotations

from torch import Tensor

from adapter_kernels import SelectedRows, select_rows

from ..config import MEFTConfig


def select_neurons(
    x: Tensor, logits: Tensor, keys: Tensor, config: MEFTConfig, load: Tensor | None = None
) -> SelectedRows:
    """The neurons of each token, where the keys are: the `top_k` with the largest positive scores; without a wait.

    Args:
        x: [T, d]. logits: W_g x, [T, E]. keys: [r, d], on x's device, of x's dtype or a narrower one.
        load: int64 [r], to which the picks of each neuron are added; None: not counted.

    Returns:
        ids, int32 [T, K], -1 where there are fewer, with their scores and x . w, [T, K], and the distinct rows; K is at
        most `top_k`.
    """
    return select_rows(x, logits, keys, config.probed, config.top_k, factor=config.router_factor, load=load)
