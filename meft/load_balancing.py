"""The optional loss that evens the experts' load."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adapter_kernels import router_topk

from .config import MEFTConfig
from .retrieval.forward_context import ForwardContext


class _Attached(torch.autograd.Function):
    """y unchanged; the backward pass adds the gradient of a loss that the model's own loss does not contain."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, context: ForwardContext | None) -> Tensor:
        ctx.context, ctx.dtype = context, loss.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scale = ctx.context.loss_scale if ctx.context is not None else None
        if scale is None:
            scale = torch.ones((), device=g.device)
        return g, scale.to(g.device, ctx.dtype), None


class _Scale(torch.autograd.Function):
    """The loss unchanged; the backward pass notes the gradient with which it begins."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, context: ForwardContext) -> Tensor:
        ctx.context = context
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ctx.context.loss_scale = g.detach()
        return g, None


def balance_loss(logits: Tensor, config: MEFTConfig) -> Tensor:
    """E sum_e f_e P_e of one layer (arXiv 2101.03961, eq. 4): 1 where the load is even.

    Args:
        logits: W_g x, [T, E].
    """
    experts, _ = router_topk(logits.detach(), config.probed)
    share = torch.bincount(experts.reshape(-1), minlength=config.experts).to(logits.dtype) / max(1, experts.numel())
    return config.experts * (share * logits.softmax(-1).mean(0)).sum()


def attach_balance_loss(y: Tensor, logits: Tensor, config: MEFTConfig, context: ForwardContext | None) -> Tensor:
    """y, such that a backward pass through it also lowers the weighted balance loss of this layer."""
    if not len(logits):
        return y
    layers = max(1, context.layers if context is not None else 1)
    return _Attached.apply(y, balance_loss(logits, config) * (config.router_aux_loss_coef / layers), context)


def note_loss_scale(output: Any, context: ForwardContext) -> None:
    """Let the backward pass of an output's loss tell the layers how it is scaled (accumulation, GradScaler)."""
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor) and loss.requires_grad:
        output.loss = _Scale.apply(loss, context)
