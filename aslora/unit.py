"""B-groups that decide together: takes the merges that the schedule says are due."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from .bank import SharedA, SharedB
from .config import ASLoRAConfig
from .schedule import due, merge_steps
from .sharing import change_of_basis, closest_pair, planned_merges, squared_distances


class MergeUnit:
    """One or, with `merge_scope="joint"`, several B-groups over the same layers that take the same merges.

    Args:
        config: the adapter's configuration.
        members: group name -> (the B-group, the A of its A-group).
    """

    def __init__(self, config: ASLoRAConfig, members: dict[str, tuple[SharedB, SharedA]]) -> None:
        self.config = config
        self.members = members
        first = next(iter(members.values()))[0]
        self.num_layers = len(first.sharing_map)
        self.planned = planned_merges(self.num_layers, config.num_merges)
        self._steps: tuple[int | None, list[int]] | None = None
        if self.num_layers > 1 and self.planned > self.num_layers - 1:
            raise ValueError(
                f"num_merges={config.num_merges} is more than the {self.num_layers} layers of "
                f"{', '.join(members)} allow: use at most num_merges={self.num_layers - 1}, or None."
            )

    @property
    def leader(self) -> SharedB:
        """The members share one map; the first stands for all."""
        return next(iter(self.members.values()))[0]

    @property
    def taken(self) -> int:
        return self.leader.merges_taken

    @property
    def pending(self) -> bool:
        """Whether merges are still to come."""
        return not self.leader.finished

    def plan(self, total_steps: int | None) -> list[int]:
        """The steps of all planned merges, made once for each length of run.

        Raises:
            ValueError: the configuration has a fraction of the run, and its length is unknown.
        """
        if self._steps is None or self._steps[0] != total_steps:
            self._steps = (total_steps, merge_steps(self.config, self.planned, total_steps))
        return self._steps[1]

    def sample(self, member: SharedB, step: int) -> None:
        """Follow one optimizer step of one member."""
        if not member.finished:
            member.sample(step)
        member.clear_dropped_rows()

    def merge_due(self, total_steps: int | None, optimizer: Optimizer | None) -> None:
        """Take the merges that are due after the latest step that all members have seen."""
        if not self.pending:
            return
        step = min(member.step for member, _ in self.members.values())
        target = min(due(self.plan(total_steps), step), self.planned)
        if self.taken < target:
            self._merge(target - self.taken, optimizer)
        if self.taken >= self.planned:
            self.finish()

    def finish(self) -> None:
        for member, _ in self.members.values():
            member.finish()

    def _merge(self, count: int, optimizer: Optimizer | None) -> None:
        mean = self.config.merge_value == "mean"
        squares = self._squares()
        for _ in range(count):
            live = self.leader.live_rows
            low, up = closest_pair(squares, self.config.merge_candidates)
            distance = float(squares[low, up].sqrt())
            for member, _ in self.members.values():
                member.merge(live[low], live[up], mean, distance, optimizer)
            if mean:
                squares = self._squares()
                continue
            # The merged group has the lower one's place in the order and the upper one's average.
            squares[low, :], squares[:, low] = squares[up, :].clone(), squares[:, up].clone()
            squares[low, low] = 0
            keep = [i for i in range(len(live)) if i != up]
            squares = squares[keep][:, keep]

    def _squares(self) -> Tensor:
        """Squared distances [k, k] of the k live groups, summed over the members."""
        live = self.leader.live_rows
        total = torch.zeros(len(live), len(live), dtype=torch.float64)
        for member, shared_a in self.members.values():
            basis = None
            if self.config.similarity == "product":
                A = shared_a.shared_A.detach()
                basis = change_of_basis(A.full_tensor() if hasattr(A, "full_tensor") else A)
            total = total + squared_distances(member.average[live], basis)
        return total
