"""The reference semantics of MEFT in plain torch: the oracle for everything faster.

Nothing here is fast: all r scores of every token are computed, and a mask over [T, r] says which are used. It works in
any floating dtype, on any device, and autograd differentiates it.

Source: arXiv 2406.04984, section 3; ties, which the paper leaves open, go to the lower id.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _largest(scores: Tensor, n: int) -> Tensor:
    """Mask, bool like `scores` [T, m], of the n largest of each row; ties go to the lower index."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :n]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def chosen_neurons(
    x: Tensor, router: Tensor, keys: Tensor, *, experts_per_token: int, top_k: int, router_factor: bool
) -> Tensor:
    """Which neurons each token picks, J.

    Args:
        x: [T, d].
        router: W_g, [E, d].
        keys: [r, d], E a divisor of r; expert e holds the neurons e r/E to (e + 1) r/E - 1.

    Returns:
        bool [T, r].
    """
    logits = x @ router.T
    scores = x @ keys.T
    each = len(keys) // len(router)
    if router_factor:
        scores = scores * logits.repeat_interleave(each, dim=1)
    probed = _largest(logits, experts_per_token).repeat_interleave(each, dim=1)
    scores = scores.masked_fill(~probed, -torch.inf)
    return _largest(scores, top_k) & (scores > 0)


def reference(
    x: Tensor,
    router: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    experts_per_token: int,
    top_k: int,
    router_factor: bool = True,
    real: Tensor | None = None,
    chosen: Tensor | None = None,
) -> Tensor:
    """What the adapter adds to the output of the FFN.

    Args:
        x: input of the FFN, [T, d].
        router: W_g, [E, d].
        keys, values: [r, d].
        experts_per_token: P. top_k: K. router_factor: as in `MEFTConfig`.
        real: bool [T], False at padding: such a token picks nothing and gets zeros. None: all are real.
        chosen: bool [T, r], picks to use in place of those that the scores make.

    Returns:
        [T, d].
    """
    if chosen is None:
        with torch.no_grad():
            chosen = chosen_neurons(
                x, router, keys, experts_per_token=experts_per_token, top_k=top_k, router_factor=router_factor
            )
    if real is not None:
        chosen = chosen & real[:, None]
    scores = x @ keys.T
    if router_factor:
        scores = scores * (x @ router.T).repeat_interleave(len(keys) // len(router), dim=1)
    return torch.where(chosen, scores.relu(), 0) @ values
