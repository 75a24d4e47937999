"""Rows of one parameter under autograd, with the gradients of tied rows summed into one of them.

Where the row that a layer reads and the row that takes its gradient differ, their values are equal: this is the
derivative of a model with one B for several layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_bridge.torch_private import backward_number


class BackwardPasses:
    """How often a gradient has come through."""

    def __init__(self) -> None:
        self.count = 0


def in_backward() -> bool:
    """Whether the autograd engine is at work here: a checkpoint recomputes its forward pass."""
    return backward_number() != -1


class AllRows(torch.autograd.Function):
    """All rows of a stack [n, out_features, r] as views; twice differentiable, with forward mode and `torch.func`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(stack: Tensor, owners: Sequence[int], passes: BackwardPasses) -> tuple[Tensor, ...]:
        return stack.unbind(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.owners, ctx.passes = inputs
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:  # type: ignore[override]
        ctx.passes.count += 1
        sums: dict[int, Tensor] = {}
        for owner, gradient in zip(ctx.owners, gradients, strict=True):
            if gradient is not None:
                sums[owner] = sums[owner] + gradient if owner in sums else gradient
        if not sums:
            return None, None, None
        zero = torch.zeros_like(next(iter(sums.values())))
        return torch.stack([sums.get(row, zero) for row in range(len(gradients))]), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, *_: Any) -> Any:  # type: ignore[override]
        return tuple(None for _ in ctx.owners) if tangent is None else tangent.unbind(0)


class OneRow(torch.autograd.Function):
    """Row `row` of a stack [n, out_features, r], whose gradient goes to row `owner`: for compiled code."""

    @staticmethod
    def forward(ctx: Any, stack: Tensor, row: int, owner: int) -> Tensor:  # type: ignore[override]
        ctx.rows, ctx.owner = stack.shape[0], owner
        return stack[row].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        stack = gradient.new_zeros(ctx.rows, *gradient.shape)
        stack[ctx.owner] = gradient
        return stack, None, None
