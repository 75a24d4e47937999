"""The run: follows optimizer steps and lets the units of all adapters take the merges that are due."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator

from torch import nn
from torch.optim.optimizer import Optimizer

from .bank import SharedB
from .unit import MergeUnit


class SharingRun:
    """A `peft_bridge.StepListener` for the adapters of one tuner.

    Attributes:
        units: adapter -> its units of B-groups that decide together.
        total_steps: adapter -> length T of its run in optimizer steps; None where it is unknown.
        nonfinite_steps: optimizer steps that were not taken because an adapter's gradient was inf or nan.
    """

    def __init__(self) -> None:
        self.units: dict[str, list[MergeUnit]] = {}
        self.total_steps: dict[str, int | None] = {}
        self.nonfinite_steps = 0
        self._warned: set[str] = set()

    def add(self, adapter_name: str, units: list[MergeUnit], total_steps: int | None) -> None:
        self.units[adapter_name] = units
        self.total_steps[adapter_name] = total_steps

    def remove(self, adapter_name: str) -> None:
        self.units.pop(adapter_name, None)
        self.total_steps.pop(adapter_name, None)
        self._warned.discard(adapter_name)

    def watched_parameters(self) -> Iterable[nn.Parameter]:
        """All A and B."""
        parameters = {}
        for units in self.units.values():
            for unit in units:
                for B, A in unit.members.values():
                    parameters[id(B.B)], parameters[id(A.A)] = B.B, A.A
        return parameters.values()

    def _stepped(self, parameters: list[nn.Parameter]) -> Iterator[tuple[str, MergeUnit, list[SharedB]]]:
        wanted = {id(p) for p in parameters}
        for adapter_name, units in self.units.items():
            for unit in units:
                members = [B for B, _ in unit.members.values() if id(B.B) in wanted]
                if members:
                    yield adapter_name, unit, members

    def before_step(self, parameters: list[nn.Parameter]) -> None:
        """Find the schedule, so that an impossible one is an error before anything has moved."""
        for adapter_name, unit, _ in self._stepped(parameters):
            if unit.pending:
                unit.plan(self.total_steps[adapter_name])

    def after_step(self, optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
        """Sample the averages and take the merges that are due."""
        for adapter_name, unit, members in self._stepped(parameters):
            for member in members:
                unit.sample(member, member.step + 1)
            unit.merge_due(self.total_steps[adapter_name], optimizer)
            if unit.pending and unit.leader.step == self.total_steps[adapter_name]:
                self.warn_of_pending(adapter_name)

    def catch_up(self, adapter_name: str, step: int) -> None:
        """Take optimizer step `step` into account unless it was counted already."""
        for unit in self.units.get(adapter_name, []):
            if unit.pending and unit.leader.B.requires_grad and unit.leader.step < step:
                for member, _ in unit.members.values():
                    unit.sample(member, step)
                unit.merge_due(self.total_steps[adapter_name], None)

    def warn_of_pending(self, adapter_name: str) -> None:
        """Warn, once, if the run of an adapter has ended before its last merge."""
        units = [u for u in self.units.get(adapter_name, []) if u.pending and u.leader.B.requires_grad]
        if not units or adapter_name in self._warned:
            return
        self._warned.add(adapter_name)
        missing = sum(u.planned - u.taken for u in units)
        last = max(u.plan(self.total_steps[adapter_name])[-1] for u in units)
        warnings.warn(
            f"The run has ended with {missing} merges of adapter '{adapter_name}' not done (the last is planned for "
            f"step {last}): train longer, or lower merge_start, merge_interval or num_merges."
        )

    def finish(self, adapter_name: str) -> None:
        """No further merges."""
        self.warn_of_pending(adapter_name)
        for unit in self.units[adapter_name]:
            unit.finish()
