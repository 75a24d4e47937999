"""Attention for a trace: allocates what flash attention does, and computes nothing.

On the meta device torch would take its plain attention, which keeps [heads, length, length] and which no GPU runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from aslora_meft.planner.live import MemoryTracker

NAME = "traced"  # with "flash" in it transformers would look for a kernel


class _Attention(torch.autograd.Function):
    """Saves query, key, value, output and the log-sum-exp, as flash attention; queries [batch, heads, length, size]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        out = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, query.new_empty(batch, heads, length, dtype=torch.float32))
        _note(2, query, key)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        _note(5, query, key)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _note(products: int, query: Tensor, key: Tensor) -> None:
    """Flops of so many products over the causal half of the pairs."""
    if MemoryTracker.current is not None:
        MemoryTracker.current.note_flops(products * query.numel() * key.shape[2])


def _forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    return _Attention.apply(query, key, value).transpose(1, 2).contiguous(), None  # type: ignore[no-untyped-call]


def register() -> None:
    """Make it known to transformers as an `attn_implementation`; there is no mask, as without padding."""
    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
