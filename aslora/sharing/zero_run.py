"""The run under DeepSpeed's ZeRO: follows the steps of an engine, which torch's optimizer hooks do not see."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from peft_bridge import EngineFollower, EngineOptimizer
from peft_bridge.deepspeed_private import ZeroSteps

from .merge_run import SharingRun
from .optimizers import moves_between_steps, refuse_norms


class ZeroRun(EngineFollower):
    """Lets a `SharingRun` follow the engine that holds the model; B and averages are those of ZeRO's copies."""

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
                        f"The optimizer {kind.__module__}.{kind.__name__} may move B between its steps, where DeepSpeed "
                        "has only parts of it: use AdamW, or set num_merges=0."
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
