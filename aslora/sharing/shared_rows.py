"""Rows of one parameter under autograd, with the gradients of tied rows summed into one of them, and their diagonals.

Where the row that a layer reads and the row that takes its gradient differ, their values are equal: this is the
derivative of a model with one B for several layers. With a diagonal the weight of layer l is
W_l + scaling * B_group(l) diag(d_l) A.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_bridge.torch_private import backward_number

from .sharded import HeldB

# The learning rate of d by that of A and B: at their rate it was too slow to help (docs/benchmarks.md).
RATE = 5.0


class BackwardPasses:
    """How often a gradient has come through."""

    def __init__(self) -> None:
        self.count = 0


def in_backward() -> bool:
    """Whether the autograd engine is at work here: a checkpoint recomputes its forward pass."""
    return backward_number() != -1


class TakenRows:
    """The rows that a training forward pass has taken from a stack, for as long as they may be taken again.

    Attributes:
        passes: the backward passes that have come through.
    """

    def __init__(self) -> None:
        self.passes = BackwardPasses()
        self._passes_at_step = 0  # of these passes: those before the last step
        self._taken: tuple[Tensor, int, int, tuple[Tensor, ...]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle, which do not take the graph of the rows."""
        return {**self.__dict__, "_taken": None}

    @property
    def any(self) -> bool:
        """Whether rows are kept."""
        return self._taken is not None

    @property
    def gradients_pending(self) -> bool:
        """Whether a backward pass has come through since the last step."""
        return self.passes.count != self._passes_at_step

    def mark_stepped(self) -> None:
        self._passes_at_step = self.passes.count
        self.forget()

    def forget(self) -> None:
        self._taken = None

    def stale(self, stack: Tensor) -> bool:
        """Whether the stack was written or replaced since, or a backward pass has ended the forward pass (FSDP2 writes
        parameters without a new version)."""
        taken = self._taken
        if taken is None or taken[0] is not stack or taken[1] != stack._version:
            return True
        return taken[2] != self.passes.count and not in_backward()

    def take(self, stack: Tensor, owners: Sequence[int]) -> None:
        """Take all rows of `stack` in one function of autograd."""
        rows: Any = AllRows.apply(stack, owners, self.passes)
        self._taken = (stack, stack._version, self.passes.count, rows)

    def __getitem__(self, position: int) -> Tensor:
        assert self._taken is not None
        return self._taken[3][position]


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


def add_diagonal(B: HeldB) -> None:
    """Give each layer of a stacked B [n, out_features, r] a diagonal: the parameter `diagonal`, [n, r] zeros.

    It holds (d - 1) / RATE, so that small steps of it are not lost in bfloat16, and weight decay draws d to 1. Its
    gradient is that of d: d moves as with a learning rate of its own, RATE times that of the group, and what clips or
    scales gradients sees no more than if d were the parameter.
    """
    n, _, r = B.stacked_B.shape
    B.diagonal = nn.Parameter(B.stacked_B.new_zeros(n, r))


def scaled(B: Tensor, diagonal: Tensor) -> Tensor:
    """B diag(d); all that reads a layer's B, in memory or in a file, has it from here.

    Args:
        B: [out_features, r].
        diagonal: [r], a row of the parameter.
    """
    return B * (1 + torch.add(diagonal, diagonal.detach(), alpha=RATE - 1))  # 1 + RATE * diagonal, with d's gradient
