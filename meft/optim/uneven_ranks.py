"""A `DistributedDataParallel.join()`, as far as rows are concerned: which ranks have a batch, and what a mean is of."""

from __future__ import annotations

import weakref

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from peft_bridge.torch_private import takes_uneven_inputs
from peft_bridge.training.uneven_inputs import marked_ranks

from .broadcasts import group_device


class UnevenRanks:
    """A `join()` that has begun on all ranks.

    Args:
        mean_of_present: whether means are over the ranks that have a batch, and not over all.

    Attributes:
        group: of the ranks.
    """

    def __init__(self, ddp: DistributedDataParallel, mean_of_present: bool) -> None:
        self._engine = weakref.ref(ddp)
        self.group: dist.ProcessGroup = ddp.process_group
        self._mean_of_present = mean_of_present
        self._ended = False

    def is_of(self, engine: object) -> bool:
        """Whether it is the last one of this engine."""
        return self._engine() is engine

    @property
    def goes_on(self) -> bool:
        """Whether ranks may have no batch left; equal on all ranks."""
        return not self._ended and takes_uneven_inputs(self._engine())

    def end(self) -> None:
        """All ranks are through."""
        self._ended = True

    def marked(self, mark: bool) -> list[int]:
        """The ranks of the group that say yes; all ranks ask."""
        return marked_ranks(mark, self.group, group_device(self.group))

    def divisor(self, present: list[int]) -> int:
        """What sums over ranks are divided by.

        Args:
            present: the ranks that have a batch.
        """
        return len(present) if self._mean_of_present else dist.get_world_size(self.group)
