"""The run: follows optimizer steps and lets the units of all adapters take the merges that are due."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer

from peft_bridge import EngineFollower, EngineOptimizer, StateOfLastRanks
from peft_bridge.deepspeed_private import ZeroSteps
from peft_bridge.torch_private import active_ddp, takes_uneven_inputs

from .merge_unit import MergeUnit
from .optimizers import learning_rate, moves_between_steps, refuse_norms
from .schedule import PUBLISHED_INTERVAL, PUBLISHED_START, uses_published_steps
from .shared_tensors import SharedB
from .ties import any_of


class SharingRun:
    """A `peft_bridge.StepListener` for the adapters of one tuner.

    Attributes:
        units: adapter -> its units of B-groups that decide together.
        total_steps: adapter -> length T of its run in optimizer steps; None where it is unknown.
        warmup_steps: adapter -> steps in which the learning rate of its run rises; 0 where they are unknown.
        nonfinite_steps: optimizer steps that were not taken because an adapter's gradient was inf or nan.
        ranks: brings those that had fewer batches to the merges of the others.
    """

    def __init__(self) -> None:
        self.units: dict[str, list[MergeUnit]] = {}
        self.total_steps: dict[str, int | None] = {}
        self.warmup_steps: dict[str, int] = {}
        self.nonfinite_steps = 0
        self._warned: set[tuple[str, str]] = set()  # (adapter, what about)
        self._seen: set[str] = set()  # adapters whose optimizer torch's hooks see
        self.ranks = StateOfLastRanks(self._b_groups, self._deciding, self._taken_over)

    def add(self, adapter_name: str, units: list[MergeUnit], total_steps: int | None) -> None:
        self.units[adapter_name] = units
        self.total_steps[adapter_name] = total_steps
        self.warmup_steps[adapter_name] = 0
        for unit in units:
            for B in unit.b_groups:
                B.before_training_forward = partial(self.check, adapter_name)

    def remove(self, adapter_name: str) -> None:
        self.units.pop(adapter_name, None)
        self.total_steps.pop(adapter_name, None)
        self.warmup_steps.pop(adapter_name, None)
        self._seen.discard(adapter_name)
        self._warned = {entry for entry in self._warned if entry[0] != adapter_name}

    def units_of(self, adapter_name: str) -> list[MergeUnit]:
        """The units of an adapter.

        Raises:
            ValueError: there is no such adapter.
        """
        if adapter_name not in self.units:
            raise ValueError(
                f"adapter_name='{adapter_name}' is no ASLoRA adapter here: use one of {sorted(self.units)}."
            )
        return self.units[adapter_name]

    def watched_parameters(self) -> Iterable[nn.Parameter]:
        """All A, B and diagonals."""
        members = [member for units in self.units.values() for unit in units for member in unit.members.values()]
        return {id(p): p for B, A in members for p in (*B.parameters(), *A.parameters())}.values()

    def _stepped(self, parameters: list[nn.Parameter]) -> Iterator[tuple[str, MergeUnit, list[SharedB]]]:
        stepped = {id(p) for p in parameters}
        for adapter_name, units in self.units.items():
            for unit in units:
                members = [B for B, _ in unit.members.values() if id(B.stacked_B) in stepped]
                if members:
                    yield adapter_name, unit, members

    # ------------------------------------------------------------------ what others have written

    def check(self, adapter_name: str) -> None:
        """Compare ties with values and buffers before a training forward pass takes the rows.

        Raises:
            RuntimeError: an engine has stepped that torch's optimizer hooks do not see, or this is inside of a `join()`
                that began without the adapter.
        """
        units = self._unchecked(adapter_name)
        if units and takes_uneven_inputs(ddp := active_ddp()) and not self.ranks.follows(ddp):
            raise RuntimeError(
                "A DistributedDataParallel.join() leaves out ASLoRA adapters that are added after its "
                "DistributedDataParallel was made: wrap the model anew, and enter the context of that."
            )
        if any_of(flag for unit in units for flag in unit.change_flags()):
            for unit in units:
                unit.refuse_unseen_step()
            for unit in units:
                unit.reconcile()

    def _b_groups(self) -> list[SharedB]:
        return [B for units in self.units.values() for unit in units for B in unit.b_groups]

    def _deciding(self) -> Iterator[nn.Parameter]:
        """The A, B and diagonals on which merges that are to come depend."""
        for unit in (unit for units in self.units.values() for unit in units if unit.pending):
            for B, A in unit.members.values():
                yield from (*B.parameters(), *A.parameters())

    def _taken_over(self) -> None:
        for units in self.units.values():
            for B, A in (member for unit in units for member in unit.members.values()):
                B.take_over()
                A.products.forget()

    def _unchecked(self, adapter_name: str) -> list[MergeUnit]:
        units = []
        for unit in self.units.get(adapter_name, []):
            groups = [B for B in unit.b_groups if B.stacked_B.requires_grad and B.stale]
            for B in groups:
                B.forget_views()
                B.checked = True
            if groups:
                units.append(unit)
        return units

    # ------------------------------------------------------------------ optimizer steps

    def before_step(self, optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
        """Compare ties once more, and find what is impossible before anything has moved.

        Raises:
            ValueError: B is sharded by FSDP1, the schedule is a fraction of a run of unknown length, or the optimizer
                uses norms of parameters.
        """
        self.ranks.before_step(optimizer)
        stepped = list(self._stepped(parameters))
        for adapter_name, _, members in stepped:
            _refuse_flattened(adapter_name, members)
        if any_of(flag for _, unit, _ in stepped for flag in unit.change_flags()):
            for _, unit, _ in stepped:
                unit.reconcile()
        for adapter_name, unit, members in stepped:
            if unit.pending:
                unit.plan(self.total_steps[adapter_name], self.warmup_steps[adapter_name])
                self._warn_of_unknown_length(adapter_name, unit)
            if unit.pending or unit.taken:
                for member in members:
                    refuse_norms(optimizer, member.stacked_B)

    def before_closure(self, optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
        """Mirror rows whose owners the optimizer has moved, for the closure's forward pass."""
        for _, _, members in self._stepped(parameters):
            for member in members:
                member.mirror()

    def gradients_ready(self, optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
        """Leave no gradient on mirrored rows."""
        for _, _, members in self._stepped(parameters):
            for member in members:
                member.collect_gradients()

    def after_step(self, optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
        """Mirror rows, update the averages and take the merges that are due."""
        for adapter_name, unit, members in self._stepped(parameters):
            self._seen.add(adapter_name)
            for member in members:
                member.after_step(member.step + 1)
            for _, A in unit.members.values():
                A.products.forget()  # FSDP2 writes parameters without a new version
            self._merge_due(adapter_name, unit, partial(_learning_rate_is_zero, optimizer, members))
            if moves_between_steps(optimizer):
                for member in members:
                    member.mirror_state(optimizer.state.get(member.stacked_B, {}))
            if unit.pending and unit.leader.step == self.total_steps[adapter_name]:
                self.warn_of_pending(adapter_name)

    def make_state(self, optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
        """Nothing moves."""

    def record_step(self, adapter_name: str, step: int) -> None:
        """Take optimizer step `step` into account, unless the hooks see this adapter's steps; mirror rows in any case.

        Raises:
            ValueError: the engine holds B flattened or in parts.
        """
        seen = adapter_name in self._seen or self.nonfinite_steps > 0
        for unit in self.units.get(adapter_name, []):
            if not unit.leader.stacked_B.requires_grad:
                continue
            _refuse_flattened(adapter_name, unit.b_groups)
            if seen or (unit.pending and unit.leader.step >= step):
                for member in unit.b_groups:
                    member.mirror()
                    member.mark_stepped()
                continue
            for member in unit.b_groups:
                member.after_step(step)
            self._merge_due(adapter_name, unit)

    def _merge_due(self, adapter_name: str, unit: MergeUnit, no_move: Callable[[], bool] = lambda: False) -> None:
        unit.merge_due(self.total_steps[adapter_name], self.warmup_steps[adapter_name], no_move)

    # ------------------------------------------------------------------ warnings, the end

    def _is_first(self, adapter_name: str, about: str) -> bool:
        """Whether this is the first warning of its kind about this adapter; later calls say no."""
        first = (adapter_name, about) not in self._warned
        self._warned.add((adapter_name, about))
        return first

    def _warn_of_unknown_length(self, adapter_name: str, unit: MergeUnit) -> None:
        if uses_published_steps(unit.config, self.total_steps[adapter_name]) and self._is_first(adapter_name, "length"):
            warnings.warn(
                f"The length of the run is unknown, so adapter '{adapter_name}' merges at the published steps "
                f"(merge_start={PUBLISHED_START}, merge_interval={PUBLISHED_INTERVAL} where not set): set total_steps "
                "for a schedule that fits the run."
            )

    def warn_of_pending(self, adapter_name: str) -> None:
        """Warn, once, if the run of an adapter has ended before its last merge."""
        units = [u for u in self.units.get(adapter_name, []) if u.pending and u.leader.stacked_B.requires_grad]
        if not units or not self._is_first(adapter_name, "pending"):
            return
        missing = sum(u.planned - u.taken for u in units)
        try:
            plans = [u.plan(self.total_steps[adapter_name], self.warmup_steps[adapter_name]) for u in units]
            planned = f"step {max(plan[-1] for plan in plans)}"
        except ValueError:  # a fraction of a run that never began, so that its length is not known
            planned = "a fraction of a run of unknown length"
        warnings.warn(
            f"The run has ended with {missing} merges of adapter '{adapter_name}' not done (the last is planned for "
            f"{planned}): train longer, or lower merge_start, merge_interval or num_merges."
        )

    def finish(self, adapter_name: str) -> None:
        """No further merges."""
        units = self.units_of(adapter_name)
        self.warn_of_pending(adapter_name)
        for unit in units:
            unit.finish()


class ZeroRun(EngineFollower):
    """Lets a `SharingRun` follow the DeepSpeed engine that holds the model; B and averages are of ZeRO's copies."""

    run: SharingRun
    _engine_optimizer: Any = None

    def engine_begins(self, optimizer: Optimizer) -> None:
        """Raises: ValueError: the optimizer uses norms of parameters, or moves them between its steps."""
        view: Any = EngineOptimizer(optimizer, list(self.run.watched_parameters()))
        stepped = {id(p) for p in view.parameters}
        for units in self.run.units.values():
            for B in (B for unit in units if unit.pending or unit.taken for B in unit.b_groups):
                if id(B.stacked_B) not in stepped:
                    continue
                refuse_norms(view, B.stacked_B)
                if moves_between_steps(view):
                    kind = type(optimizer)
                    raise ValueError(
                        f"The optimizer {kind.__module__}.{kind.__name__} may move B between its steps, while "
                        "DeepSpeed has parts of it: use AdamW, or set num_merges=0."
                    )
        self._engine_optimizer = view

    def engine_made(self, zero: ZeroSteps) -> None:
        for units in self.run.units.values():
            for B, A in (member for unit in units for member in unit.members.values()):
                B.zero = A.zero = zero
                B.forget_views()

    def before_engine_step(self) -> None:
        self.run.before_step(self._engine_optimizer, self._engine_optimizer.parameters)

    def after_engine_step(self, divisor: float) -> None:
        self.run.after_step(self._engine_optimizer, self._engine_optimizer.parameters)


def _learning_rate_is_zero(optimizer: Optimizer, members: list[SharedB]) -> bool:
    return not any(learning_rate(optimizer, member.stacked_B) for member in members)


def _refuse_flattened(adapter_name: str, members: list[SharedB]) -> None:
    whole = [member.stacked_B for member in members if member.zero is None or not member.zero.alive]
    if any(B.ndim != 3 or not B.numel() for B in whole):
        raise ValueError(
            f"Adapter '{adapter_name}' is flattened by its engine (FullyShardedDataParallel, which is FSDP1), so that "
            "ASLoRA cannot merge rows of its stacked B: use FSDP2 (torch.distributed.fsdp.fully_shard, in accelerate's "
            "configuration fsdp_version: 2), or DeepSpeed's ZeRO."
        )
