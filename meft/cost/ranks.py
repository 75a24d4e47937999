"""What the ranks of one machine take of its memory and of its memory's bandwidth for rows on the host: a copy each, or
one copy for all of which each rank updates its share.

A bound, as `step_time`: reductions between GPUs and between machines are not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..gradient.node_sum import block_bytes
from .host_bytes import HostBytes
from .memory import FP32, Plan
from .step_time import BaseModel, Ceilings, step_time

# Distinct neurons of the batches of 1, 2, 4 and 8 ranks, over those of one: as those of SmolLM2 grow with the batch
# (benchmarks/results/routing_smollm2.npz: 2, 4, 8 and 16 rows of 256 tokens).
_GROWTH = (1.0, 0.52 / 0.442, 0.628 / 0.442, 0.748 / 0.442)


def union_of_ranks(plan: Plan, ranks: int) -> int:
    """Distinct neurons of a layer that some ranks use in an optimizer step."""
    doublings = math.log2(ranks)
    whole = int(doublings)
    if whole >= len(_GROWTH) - 1:
        grown = _GROWTH[-1] * (_GROWTH[-1] / _GROWTH[-2]) ** (doublings - len(_GROWTH) + 1)
    else:
        grown = _GROWTH[whole] + (doublings - whole) * (_GROWTH[whole + 1] - _GROWTH[whole])
    return min(plan.shape.r, round(plan.step_union * grown))


@dataclass(frozen=True)
class RankBytes(HostBytes):
    """What one of several ranks reads and writes.

    Attributes:
        ranks: of the machine.
        shared: whether they have one copy of the rows.
    """

    ranks: int = 1
    shared: bool = False

    @property
    def stepped(self) -> int:
        """Rows that this rank updates."""
        union = union_of_ranks(self.plan, self.ranks)
        return -(-union // self.ranks) if self.shared else union

    @property
    def read_gradient(self) -> int:
        """Of the mean, in fp32."""
        return super().read_gradient if self.ranks == 1 else FP32

    def looked_at(self) -> int:
        """Of a step's gradients: their order, and the mean over the ranks with its norm."""
        if self.ranks == 1 or self._nothing:
            return super().looked_at()
        own, union = self.plan.step_union, union_of_ranks(self.plan, self.ranks)
        values = 2 * own if own > self.plan.work.union else 0  # brought into order
        kept = self.plan.kept_gradient
        if self.shared:  # copied for the others; all ranks' values of its share are read, and the mean written
            values += own + own + self.stepped
            as_kept = own
        else:  # zeros, own values put into them, the mean written and its norm read
            values += (3 if kept < FP32 else 2) * own + 3 * union
            as_kept = own if kept < FP32 else 0  # widened first
        return 2 * self.plan.shape.d * (FP32 * values + kept * as_kept)


def host_bytes_of_ranks(plan: Plan, ranks: int, *, shared: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes in host memory by part: of each rank by itself, and of all together, once."""
    own = plan.host_bytes()
    if not own or ranks == 1:
        return own, {}
    shape = plan.shape
    mean = 2 * shape.layers * shape.d * union_of_ranks(plan, ranks) * FP32
    if not shared:
        return {**own, "mean of the gradients": mean}, {}
    together = {part: size for part, size in own.items() if not part.startswith("gradient")}
    blocks = 2 * ranks * block_bytes(shape.values * FP32, shape.d * FP32, ranks)
    together |= {"mean of the gradients": mean, "blocks of gradients to sum": blocks}
    return {part: size for part, size in own.items() if part.startswith("gradient")}, together


def tokens_per_second(
    plan: Plan, base: BaseModel, ceilings: Ceilings, ranks: int, *, shared: bool, clipping: bool, checkpointing: bool
) -> float:
    """At most so many tokens of all ranks, each of which has a GPU and a link of its own."""
    divided = replace(ceilings, host_bytes=ceilings.host_bytes / ranks, host_flops=ceilings.host_flops / ranks)
    host = RankBytes(plan, ranks, shared)
    time = step_time(plan, base, divided, clipping=clipping, checkpointing=checkpointing, moved=host)
    return ranks * time.tokens_per_second
