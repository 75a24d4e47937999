"""DeepSpeed's ZeRO engines: what they step, save and load, with nothing for the user to call.

ZeRO steps flattened or partitioned copies of the parameters, which torch's optimizer hooks cannot recognise. An engine
that is made over a model with an adapter of a method asks its tuner (`set_deepspeed_parallelism`), however it is made:
by accelerate, by a Trainer or by `deepspeed.initialize`. From there on the tuner follows its steps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from ..deepspeed_private import (
    ZeroSteps,
    around_checkpoints,
    before_zero_is_made,
    engine_in_construction,
    steps_parameters,
    unsupported,
)

_followed: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()  # tuner -> engine


class EngineFollower(nn.Module):
    """A module that follows the steps of the engine that its model is in.

    Attributes:
        steps_of_parameters: whether an engine that steps the model's own parameters (stage 0 in float32) is left to
            torch's optimizer hooks; else it is refused.
    """

    steps_of_parameters: ClassVar[bool] = True

    def keep_from_engine(self) -> None:
        """The engine is about to look for parameters: hide those that it shall not have."""

    def given_back(self) -> None:
        """No engine holds the model any more: show what was hidden."""

    def engine_begins(self, optimizer: Optimizer) -> None:
        """ZeRO is about to be made from an optimizer: take out parameters that it shall not have, and refuse it."""

    def engine_made(self, zero: ZeroSteps) -> None:
        """ZeRO was made."""

    def before_engine_step(self) -> None:
        """The gradients of a step are complete."""

    def engine_norm(self) -> Tensor | None:
        """The norm of gradients that ZeRO does not have, see `ZeroSteps.watch`."""
        return None

    def after_engine_step(self, divisor: float) -> None:
        """ZeRO has taken a step; `divisor` as in `ZeroSteps.watch`."""

    def engine_step_skipped(self) -> None:
        """ZeRO has found inf or nan, and taken no step."""

    def engine_saving(self, folder: str) -> Callable[[], None]:
        """A checkpoint is about to be written; what is returned is called when it was."""
        return _nothing

    def engine_loading(self) -> Callable[[], None]:
        """A checkpoint is about to be read; what is returned is called when it was."""
        return _nothing

    def engine_loaded(self, folder: str) -> None:
        """A checkpoint was read with the states of its optimizer."""

    # ------------------------------------------------------------------ engines

    @property
    def follows_engine(self) -> bool:
        """Whether an engine whose steps are followed holds the model."""
        engine = _followed.get(self)
        return engine is not None and engine() is not None

    def set_deepspeed_parallelism(self, *_: Any) -> None:
        """DeepSpeed calls it while an engine is being made.

        Raises:
            ValueError: the engine's configuration is not supported.
        """
        engine = engine_in_construction()
        known = _followed.get(self)
        if engine is None or (known is not None and known() is engine):
            return
        if self.steps_of_parameters and steps_parameters(engine):
            return
        field = unsupported(engine)
        if field is not None:
            raise ValueError(f"ASLoRA and MEFT do not support this setting of DeepSpeed: {field}.")
        self.keep_from_engine()
        before_zero_is_made(engine, self.engine_begins, self._follow_zero, partial(self._leave, weakref.ref(engine)))
        around_checkpoints(engine, self.engine_saving, self.engine_loading, self.engine_loaded)
        _followed[self] = weakref.ref(engine)

    def _follow_zero(self, zero: ZeroSteps) -> None:
        self.engine_made(zero)
        zero.watch(
            self.before_engine_step, self.engine_norm, self.after_engine_step, self.engine_step_skipped,
            partial(self._leave, weakref.ref(zero.engine)),
        )  # fmt: skip

    def _leave(self, engine: weakref.ref[Any]) -> None:
        if _followed.get(self) == engine:  # else another one has the model by now
            del _followed[self]
            self.given_back()


def _nothing() -> None:
    pass


def group_of_each(optimizer: Optimizer) -> dict[int, int]:
    """id of a parameter -> the number of the parameter group that holds it; ZeRO keeps the groups in their order."""
    return {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}


class EngineOptimizer:
    """The part of ZeRO's optimizer that steps some parameters, as their listener would see it without ZeRO.

    Attributes:
        stepped_by: the optimizer that steps ZeRO's copies.
        state: empty: the state is of flattened copies.
    """

    def __init__(self, optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
        held = group_of_each(optimizer)
        self.stepped_by = optimizer
        self.state: dict[Any, Any] = {}
        self._groups = [(held[id(p)], p) for p in parameters if id(p) in held]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those of the given parameters that the optimizer steps."""
        return [parameter for _, parameter in self._groups]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """One group for each parameter, with the values of ZeRO's group as they are now."""
        groups = self.stepped_by.param_groups
        return [{**groups[number], "params": [parameter]} for number, parameter in self._groups]
