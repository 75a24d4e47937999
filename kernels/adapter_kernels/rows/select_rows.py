"""From hidden states to the rows that they use: `router_topk`, `expert_topk` and `row_union_window` in turn.

In host memory the C++ library does the three in one call (`host_topk`), where nobody looks at what happens between
them: of few tokens most of the time is that of the calls.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..runtime import dispatch
from ..topk import host_topk
from ..topk.expert_topk import expert_topk
from ..topk.router_topk import router_topk
from .row_union import row_union_window

__all__ = ["SelectedRows", "select_rows"]


class SelectedRows(NamedTuple):
    """The neurons that T tokens use, and the rows that these are.

    Attributes:
        ids: int32 [T, K], each token's neurons, the largest score first; -1 after the last.
        scores, dots: [T, K], float32 or float64, with the router's factor and without; 0 where there is no neuron.
        rows: int32, the distinct ids, ascending, in a buffer of the size that they can have.
        size: int32 [1], how many there are.
        position: int32 [T, K], each pick's place in `rows`, -1 where there is none.
    """

    ids: Tensor
    scores: Tensor
    dots: Tensor
    rows: Tensor
    size: Tensor
    position: Tensor


def select_rows(
    x: Tensor, logits: Tensor, keys: Tensor, P: int, K: int, *, factor: bool, load: Tensor | None = None
) -> SelectedRows:
    """The K neurons with the largest positive scores of each token; without a wait, and without a graph.

    Args:
        x: [T, d]. logits: W_g x, [T, E]. keys: [r, d]; as `router_topk` and `expert_topk` take them.
        P: experts of a token. K: picks of a token; at most those of P experts, P r / E, are used.
        factor: whether a score carries the logit of its expert.
        load: int64 [n], n a divisor of r, to which the picks of each group of r/n neurons are added; None: not counted.

    Raises:
        ValueError: as the three ops.
    """
    E, r = logits.shape[-1], keys.shape[0]
    K = min(K, P * (r // max(1, E)))
    if not dispatch.use_triton(None, x.device) and dispatch.at_once(x, logits):
        made = host_topk.select_rows(x, logits, keys, P, K, factor, load)
        if made is not None:
            return SelectedRows(*made)
    experts, factors = router_topk(logits, P)
    ids, scores, dots = expert_topk(x, keys, experts, factors if factor else None, K, E=E, by_neuron=False)
    rows, count, _, position = row_union_window(ids, r, max(1, min(r, ids.numel())), load=load)
    return SelectedRows(ids, scores, dots, rows, count, position)
