"""The torch path of `router_topk`."""

from __future__ import annotations

import torch
from torch import Tensor

from .ordering import stable_topk


def select(logits: Tensor, P: int) -> tuple[Tensor, Tensor]:
    """The picked logits and their experts, [T, P]."""
    experts = stable_topk(logits, P)
    return logits.gather(1, experts), experts.to(torch.int32)
