"""B-groups that decide together: takes the merges that the schedule says are due."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..config import ASLoRAConfig
from ..shared_a import SharedA
from .merge import Merge
from .merge_math import change_of_bases, closest_pair, common_refinement, planned_merges, records_fit, squared_distances
from .schedule import due, merge_steps
from .shared_tensors import SharedB
from .ties import Ties, map_by_value, matches_values
from .unseen_steps import UNSEEN_STEP


class MergeUnit:
    """One or, with `merge_scope="joint"`, several B-groups over the same layers that take the same merges.

    Args:
        config: the adapter's configuration.
        members: group name -> (the B-group, the A of its A-group).
    """

    def __init__(self, config: ASLoRAConfig, members: dict[str, tuple[SharedB, SharedA]]) -> None:
        self.config = config
        self.members = members
        self.num_layers = len(self.leader.ties.owners)
        self.planned = planned_merges(self.num_layers, config.num_merges)
        self._steps: tuple[int | None, int, list[int]] | None = None
        self._warned = False
        if self.num_layers > 1 and self.planned > self.num_layers - 1:
            raise ValueError(
                f"num_merges={config.num_merges} is more than the {self.num_layers} layers of "
                f"{', '.join(members)} allow: use at most num_merges={self.num_layers - 1}, or None."
            )

    @property
    def b_groups(self) -> list[SharedB]:
        """The B-groups."""
        return [B for B, _ in self.members.values()]

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

    def plan(self, total_steps: int | None, warmup_steps: int = 0) -> list[int]:
        """The steps of all planned merges, made once for each length of run.

        Raises:
            ValueError: the configuration has a fraction of the run, and its length is unknown.
        """
        if self._steps is None or self._steps[:2] != (total_steps, warmup_steps):
            steps = merge_steps(self.config, self.planned, total_steps, warmup_steps)
            self._steps = (total_steps, warmup_steps, steps)
        return self._steps[2]

    # ------------------------------------------------------------------ what others have written

    def change_flags(self) -> list[bool | Tensor]:
        """Flags, of which one is set if rows, maps or clocks were written from outside."""
        return [
            flag
            for B in self.b_groups
            if B.compared
            for flag in (
                B.ties.misses(B.rows),
                B.clock_values.differ(B.clock),
                B.ties.broken(B.stacked_B),
                not B.rows_taken and B.ties.incomplete(B.stacked_B),
            )
        ]

    def refuse_unseen_step(self) -> None:
        """Stop where rows moved apart after a backward pass, and no optimizer step was seen.

        Raises:
            RuntimeError: an engine has stepped that torch's optimizer hooks do not see.
        """
        for name, (B, _) in self.members.items():
            if B.gradients_pending and B.compared and bool(B.ties.broken(B.stacked_B)):
                raise RuntimeError(f"{name}: {UNSEEN_STEP}")

    def reconcile(self) -> None:
        """Derive the ties from values and buffers anew, after they were written from outside.

        A recorded map holds as far as rows have equal bits, and rows with equal bits share. If that is what the map
        says, and the recorded merges lead there, all goes on as planned; else no further merges follow.
        """
        groups = {name: B for name, (B, _) in self.members.items() if B.compared}
        recorded = {name: B.read("rows") for name, B in groups.items()}
        maps = {name: map_by_value(B.stacked_B, recorded[name]) for name, B in groups.items()}
        if len({tuple(owners) for owners in maps.values()}) > 1:
            maps = dict.fromkeys(maps, common_refinement(list(maps.values())))
        fits = all(records_fit(recorded[n], B.history.tolist(), B.read("clock")) for n, B in groups.items())
        if maps == recorded and fits:
            for name, B in groups.items():
                B.ties = Ties(maps[name])
                B.clock_values.forget()
            return
        mismatched = [name for name, B in groups.items() if not matches_values(B.stacked_B, recorded[name])]
        pending = self.pending
        for name, B in groups.items():
            B.set_owners(maps[name])
        if (mismatched or pending) and not self._warned:
            self._warned = True
            why = (
                f"the sharing map of {', '.join(mismatched)} does not fit the values of B"
                if mismatched
                else "B was written"
            )
            warnings.warn(
                f"{', '.join(self.members)}: {why}. Layers share where their B are equal: {self.taken} of "
                f"{self.planned} merges count as taken, and no further merges follow."
            )

    # ------------------------------------------------------------------ merges

    def merge_due(
        self, total_steps: int | None, warmup_steps: int = 0, no_move: Callable[[], bool] = lambda: False
    ) -> None:
        """Take the merges that are due after the latest step that all members have seen.

        Those for which there are no distances yet, because nothing has moved or groups are zero, wait for later steps.

        Args:
            no_move: whether this step moved nothing, because the learning rate is 0.
        """
        if not self.pending:
            return
        step = min(member.step for member in self.b_groups)
        target = min(due(self.plan(total_steps, warmup_steps), step), self.planned)
        if self.taken < target and not (no_move() and self._unmoved()):
            self._merge(target - self.taken)
        if self.taken >= self.planned:
            self.finish()

    def finish(self) -> None:
        for member in self.b_groups:
            member.finish()

    def _unmoved(self) -> bool:
        """Whether no B has moved since the first update of the averages: then the averages are B itself."""
        return all(torch.equal(B.average, B.full_tensor().to(B.average.dtype)) for B in self.b_groups)

    def _merge(self, count: int) -> None:
        """Take up to `count` merges; those for which there is no distance yet are left to later steps."""
        mean = self.config.merge_value == "mean"
        squares = self._squares()
        for _ in range(count):
            live = self.leader.live_rows
            pair = closest_pair(squares, self.config.merge_candidates)
            if pair is None:
                return
            low, up = pair
            distance = float(squares[low, up].sqrt())
            merges = [Merge(member, live[low], live[up], mean, distance) for member in self.b_groups]
            for merge in merges:
                merge.write_values()
            for merge in merges:
                merge.write_map()
            if mean:
                squares = self._squares()
                continue
            # The merged group has the lower one's place in the order and the upper one's average.
            squares[low, :], squares[:, low] = squares[up, :].clone(), squares[:, up].clone()
            squares[low, low] = 0
            keep = [i for i in range(len(live)) if i != up]
            squares = squares[keep][:, keep]

    def _squares(self) -> Tensor:
        """Squared distances [k, k] of the k live groups, summed over the members; -1 where both are zero."""
        live = self.leader.live_rows
        total = torch.zeros(len(live), len(live), dtype=torch.float64, device="cpu")
        zero = torch.ones(len(live), dtype=torch.bool, device="cpu")
        for member, shared_a in self.members.values():
            basis = None
            if self.config.similarity == "product":
                r = self.config.r
                basis = change_of_bases(shared_a.full_tensor(), r, member.stacked_B.shape[-1] // r)
                basis = basis.to(member.average.device)  # a device map may put A elsewhere
            averages = member.average[live]
            total = total + squared_distances(averages, basis)
            zero &= (averages == 0).flatten(1).all(1).cpu()
        total[zero[:, None] & zero] = -1
        return total
