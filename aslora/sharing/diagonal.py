"""The diagonal of a layer, between A and the B that it shares: W_l + scaling * B_group(l) diag(d_l) A."""

from __future__ import annotations

from torch import Tensor, nn

from .sharded import HeldB

# d is 1 + RATE * the parameter. Adam's steps do not depend on the scale of a gradient, so d moves 5 times as far in a
# step as A and B do: at their rate it was too slow to help (docs/benchmarks.md).
RATE = 5.0


def add_diagonal(B: HeldB) -> None:
    """Give each layer of a stacked B [n, out_features, r] a diagonal: the parameter `diagonal`, [n, r] zeros.

    It holds (d - 1) / RATE, which bfloat16 resolves more finely than d, and which weight decay draws to d = 1.
    """
    n, _, r = B.stacked_B.shape
    B.diagonal = nn.Parameter(B.stacked_B.new_zeros(n, r))


def scaled(B: Tensor, diagonal: Tensor) -> Tensor:
    """B diag(d) with d = 1 + RATE * diagonal; all that reads a layer's B, in memory or in a file, has it from here.

    Args:
        B: [out_features, r].
        diagonal: [r], a row of the parameter.
    """
    return B * (1 + RATE * diagonal)
