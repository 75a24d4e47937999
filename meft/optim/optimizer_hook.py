"""Updates of the touched rows at the steps of whichever optimizer holds them; `row_adamw` says by which rule."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from typing import Any

from accelerate.state import GradientState
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from peft_bridge import StateOfLastRanks
from peft_bridge.deepspeed_private import adam_of

from ..config import MEFTConfig
from ..gradient.row_gradient import RowGradient, as_row_gradient, overflow_watchers
from ..row_optimizer import RowOptimizerConfig
from ..table.moments import KEY, count_step
from ..table.row_step import StepRule
from ..table.row_table import RowTable
from .table_steps import TableStep, change_places, update_table, update_tables

_BNB_ADAM = {"Adam", "AdamW", "Adam8bit", "AdamW8bit", "Adam32bit", "AdamW32bit"}


def _is_bitsandbytes_adam(optimizer: Optimizer) -> bool:
    kind = type(optimizer)
    return kind.__module__.startswith("bitsandbytes.") and kind.__name__.removeprefix("Paged") in _BNB_ADAM


def _decoupled(optimizer: Optimizer, group: dict[str, Any]) -> bool | None:
    """Whether an Adam's weight decay is decoupled; None of an optimizer whose rule is unknown."""
    if type(optimizer) in (Adam, AdamW):  # by exact type: a subclass may step by another rule
        return bool(group.get("decoupled_weight_decay", type(optimizer) is AdamW))
    return True if _is_bitsandbytes_adam(optimizer) else adam_of(optimizer)


def rule_of(optimizer: Optimizer, group: dict[str, Any], config: RowOptimizerConfig) -> StepRule:
    """The row rule of one step.

    Args:
        optimizer: the one that steps.
        group: its parameter group with the rows.
        config: its fields take precedence over the group's.

    Raises:
        ValueError: the optimizer is no Adam or AdamW whose rule is known, and `config` has no lr.
    """
    decoupled = _decoupled(optimizer, group)
    if decoupled is None and config.lr is None:
        raise ValueError(
            f"MEFT's rows are updated by the rule of Adam or AdamW, and {type(optimizer).__name__} is neither: use "
            "one of these, give the rows to meft.RowAdamW, or set row_optimizer=dict(lr=..., betas=...) in MEFTConfig."
        )
    for name, needed in (("amsgrad", False), ("maximize", False), ("bias_correction", True)):
        if decoupled is not None and bool(group.get(name, needed)) != needed:
            raise ValueError(
                f"{type(optimizer).__name__} has {name}={group[name]}, which MEFT's rows do not support: set it to "
                f"{needed}."
            )
    known = group if decoupled is not None else {}
    beta1, beta2 = config.betas or known.get("betas", (0.9, 0.999))

    def setting(name: str, default: float) -> float:
        value = getattr(config, name)
        return float(known.get(name, default) if value is None else value)

    return StepRule(
        lr=setting("lr", 0.0),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=setting("eps", 1e-8),
        weight_decay=setting("weight_decay", 0.0),
        decoupled=decoupled is not False,
    )


def group_of(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """The parameter group that holds a parameter."""
    return next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))


def warn_of_lost_moments(optimizer: Optimizer, tables: list[RowTable]) -> None:
    """Warn where an optimizer that was restored has moments, but none of the rows."""
    rows = {table.rows for table in tables}
    others = any(state for parameter, state in optimizer.state.items() if parameter not in rows)
    if others and not any(table.restored or KEY in optimizer.state.get(table.rows, {}) for table in tables):
        warnings.warn(
            f"{type(optimizer).__name__} has the state of other parameters but no moments of MEFT's rows: they "
            "restart. A state that aslora-meft 0.1 saved has them in a file of its own: use "
            "model.base_model.load_training_state."
        )


TWO_OPTIMIZERS = (
    "A table of MEFT rows is in two optimizers, a meft.RowAdamW and another one: leave it out of one of them."
)


class RowSteps:
    """A `peft_bridge.StepListener`: updates the touched rows at the steps of the optimizer that holds them.

    Attributes:
        tables: adapter -> its tables.
        configs: adapter -> its configuration.
        routers: adapter -> of each layer, the adapters' routers.
        nonfinite_steps: steps that changed nothing because a gradient was inf or nan, those that a GradScaler
            skipped included.
        averaged: whether the gradients of the forward pass that ran last are averaged over ranks.
        last_ranks: brings what the optimizer keeps of routers, and of others, to ranks that had fewer batches.
    """

    def __init__(self) -> None:
        self.tables: dict[str, list[RowTable]] = {}
        self.configs: dict[str, MEFTConfig] = {}
        self.routers: dict[str, list[nn.ModuleDict]] = {}
        self.nonfinite_steps = 0
        self.averaged = False
        self.last_ranks = StateOfLastRanks()
        self._taken: list[TableStep] = []
        self._overflow: weakref.ref[Tensor] | None = None
        self._seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # optimizers that have stepped
        overflow_watchers.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_taken": [], "_overflow": None, "_seen": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._seen = weakref.WeakSet()
        overflow_watchers.add(self)

    def note_overflow(self, owners: set[int], found_inf: Tensor) -> None:
        """A GradScaler has found inf or nan and will skip the step; it may look at several lists of gradients."""
        affected = any(id(table.rows) in owners for tables in self.tables.values() for table in tables)
        if affected and (self._overflow is None or self._overflow() is not found_inf):
            self._overflow = weakref.ref(found_inf)
            self.nonfinite_steps += 1

    def _of(self, parameters: Iterable[nn.Parameter]) -> list[tuple[str, RowTable]]:
        wanted = {id(p) for p in parameters}
        return [(name, t) for name, tables in self.tables.items() for t in tables if id(t.rows) in wanted]

    def watched_parameters(self) -> Iterable[nn.Parameter]:
        """All tables, and the routers, so that a step is taken or skipped as a whole."""
        return [*(table.rows for tables in self.tables.values() for table in tables), *self._router_parameters()]

    def _router_parameters(self) -> list[nn.Parameter]:
        return [p for name, owners in self.routers.items() for owner in owners for p in owner[name].parameters()]

    def before_step(self, optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
        """Raise for an optimizer whose rule is unknown, before anything is stepped."""
        for table, _, gradient, _ in self._taken:  # by a step that raised
            if table.rows.grad is None:
                table.rows.grad = gradient
        self._taken = []
        for name, table in self._of(parameters):
            table.check_tasks()
            owner = table.claimed_by() if table.claimed_by is not None else None
            if owner is optimizer:  # a RowAdamW, which updates by itself
                continue
            if owner is not None:
                raise ValueError(TWO_OPTIMIZERS)
            rule_of(optimizer, group_of(optimizer, table.rows), self.configs[name].row_rule)
        if optimizer not in self._seen:
            self._seen.add(optimizer)
            warn_of_lost_moments(optimizer, [table for _, table in self._of(parameters)])
        self.last_ranks.before_step(optimizer)

    def before_closure(self, optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
        """Rows do not move before the step ends."""

    def gradients_ready(self, optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
        """Take the row gradients, so that the optimizer does not step the tables, and make their moments."""
        scaler = getattr(optimizer, "grad_scale", None)  # of a fused step under a GradScaler: not yet unscaled
        divisor = float(scaler) if scaler is not None else 1.0
        steps = []
        for name, table in self._of(parameters):
            if table.claimed_by is not None and table.claimed_by() is optimizer:
                continue
            if table.rows.grad is None or getattr(table.rows.grad, "consumed", False):
                table.rows.grad = None
                continue
            rule = rule_of(optimizer, group_of(optimizer, table.rows), self.configs[name].row_rule)
            steps.append((table, table.moments_in(optimizer), as_row_gradient(table.rows.grad, table.rows), rule))
        for name, tables in self.tables.items():  # nothing fails from here on
            if any(table.choice is not None and table.choice.active for table in tables):
                for router in (p for owner in self.routers[name] for p in owner[name].parameters()):
                    router.grad = None  # zeros, of one that is not trained, nor decayed
        for table, entry, gradient, rule in steps:
            table.rows.grad = None
            if divisor != 1.0:
                gradient.div_(divisor)
            # Of an optimizer that calls its closure several times in a step, the last gradient.
            self._taken = [taken for taken in self._taken if taken[0] is not table]
            self._taken.append(TableStep(table, entry, gradient, rule))

    def after_step(self, optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
        """Update the rows, those of the first layer first: the next forward pass reads them first."""
        taken, self._taken = self._taken, []
        for table, _, gradient, _ in taken:
            table.rows.grad = gradient  # it can be read until zero_grad, as any other
        for table, *_ in taken:
            count_step(optimizer, table.rows)
        update_tables(taken)
        updated = [t for name, t in self._of(parameters) if self.configs[name].updates_in_backward]
        stepped = {id(table) for table, *_ in taken}
        change_places([table for table in updated if id(table) not in stepped])

    def make_state(self, optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
        """Make the moments of the tables; rows do not move, whatever their configuration says."""
        for _, table in self._of(parameters):
            if table.claimed_by is None or table.claimed_by() is not optimizer:
                table.rows.grad = None
                table.moments_in(optimizer)

    def on_gradient(self, adapter_name: str, table: RowTable, gradient: RowGradient) -> RowGradient:
        """The copy of a gradient to the host is queued: with `in_backward` its rows are updated when it lands.

        By the rule of the optimizer that has stepped the table last, as it is now: a schedule has set the next step's
        rate. With accumulation, which accelerate (a Trainer too) tells of, by the sum when that of the last micro-batch
        lands.

        Returns:
            what autograd shall put into `.grad`.
        """
        config = self.configs[adapter_name]
        optimizer = table.stepped_by
        if not config.updates_in_backward or optimizer is None or table.updates is None:
            return gradient
        if table.claimed_by is not None and table.claimed_by() is not None:
            return gradient  # a RowAdamW updates by its own rule
        if self.averaged:
            return gradient  # at the end of the backward pass, over ranks: rows are updated within the step
        if not GradientState().sync_gradients:
            return gradient
        table.check_tasks()
        if table.rows.grad is not None:
            earlier = as_row_gradient(table.rows.grad, table.rows)
            earlier.add_(gradient)
            gradient, table.rows.grad = earlier, None
        rule = rule_of(optimizer, group_of(optimizer, table.rows), config.row_rule)
        gradient.consumed = True
        entry = table.moments_in(optimizer)
        count_step(optimizer, table.rows)
        update_table(table, entry, gradient, rule, finite_only=True)
        return gradient
