"""Rows under DeepSpeed's ZeRO, which neither flattens, partitions nor moves them: they are updated at its steps.

While an engine holds the model, rows are no parameters of their modules but buffers, and not in the optimizer that ZeRO
steps: an optimizer of their own has them, with the values of the groups that they were taken from.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from peft_bridge import EngineFollower, group_of_each
from peft_bridge.deepspeed_private import ZeroSteps
from peft_bridge.torch_private import foreach_norm
from peft_bridge.training.data_parallel import DataParallel

from ..files import training_state
from ..gradient.row_gradient import as_row_gradient
from ..table.row_table import RowTable
from .broadcasts import broadcast_rows
from .optimizer_hook import RowSteps, rule_of
from .rank_average import RankAverage

_VALUES = ("lr", "betas", "eps", "weight_decay")


class RowsOfEngine:
    """The optimizer of the rows that were taken from the one that ZeRO steps.

    Attributes:
        optimizer: an AdamW; `RowSteps` updates the rows at its steps, by its rule.

    Raises:
        ValueError: the rule of the optimizer that ZeRO steps is unknown, or a group has nothing but rows.
    """

    def __init__(self, given: Optimizer, steps: RowSteps) -> None:
        held = group_of_each(given)
        taken: dict[int, list[nn.Parameter]] = {}
        decoupled: dict[int, bool] = {}
        for name, tables in steps.tables.items():
            beside = (p for owner in steps.routers[name] for p in owner[name].parameters())
            default = next((held[id(p)] for p in beside if id(p) in held), None)
            for table in tables:
                number = held.get(id(table.rows), default if table.in_engine_before else None)
                if number is None or not table.rows.requires_grad:
                    continue
                if table.claimed_by is not None and table.claimed_by() is not None:
                    raise ValueError(
                        "meft.RowAdamW cannot step rows in DeepSpeed, which steps copies of the parameters: use "
                        "torch.optim.AdamW, whose settings the rows take."
                    )
                if table.choice is not None and table.choice.active:
                    raise ValueError(
                        "train_rows and tasks (freeze_rows) are not supported with DeepSpeed, which steps copies of "
                        "the routers: use DistributedDataParallel or FSDP2."
                    )
                group = given.param_groups[number]
                decoupled[number] = rule_of(given, group, steps.configs[name].row_rule).decoupled
                taken.setdefault(number, []).append(table.rows)
        self.rows = [row for of_group in taken.values() for row in of_group]
        rows = {id(row) for row in self.rows}
        for number in taken:
            if all(id(p) in rows for p in given.param_groups[number]["params"]):
                raise ValueError(
                    "A parameter group of the optimizer has nothing but MEFT's rows, which DeepSpeed does not step: "
                    "put the routers (.meft_router.) into it."
                )
        for number in taken:
            group = given.param_groups[number]
            group["params"] = [p for p in group["params"] if id(p) not in rows]
        self._given = given
        own = [
            {"params": of_group, "decoupled_weight_decay": decoupled[number], "of": number}
            for number, of_group in taken.items()
        ]
        self.optimizer = AdamW(own, weight_decay=0.0) if own else None

    def norm(self) -> Tensor | None:
        """2-norm of the gradients of all rows; None: there are none."""
        gradients: list[Tensor] = [as_row_gradient(row.grad, row) for row in self.rows if row.grad is not None]
        return torch.stack(list(foreach_norm(gradients))).norm() if gradients else None

    @torch.no_grad()
    def step(self, divisor: float) -> None:
        """Update the rows.

        Args:
            divisor: of the gradients.
        """
        if self.optimizer is None:
            return
        for group in self.optimizer.param_groups:
            source = self._given.param_groups[group["of"]]
            group |= {name: source[name] for name in _VALUES if name in source}
        for row in self.rows:
            if row.grad is not None and divisor != 1.0:
                row.grad.div_(divisor)
        self.optimizer.step()
        self.forget_gradients()

    def forget_gradients(self) -> None:
        """As `zero_grad` does."""
        for row in self.rows:
            row.grad = None


class ZeroRows(EngineFollower):
    """Lets a tuner's tables follow the engine that holds the model."""

    steps_of_parameters = False
    steps: RowSteps
    ranks: RankAverage
    _rows: RowsOfEngine | None = None
    _zero: ZeroSteps | None = None

    @abstractmethod
    def _named_tables(self) -> Mapping[str, RowTable]:
        """Name -> table."""

    def _all_tables(self) -> list[RowTable]:
        return [table for tables in self.steps.tables.values() for table in tables]

    def keep_from_engine(self) -> None:
        for table in self._all_tables():
            table.hide()

    def given_back(self) -> None:
        self._rows = self._zero = None
        self.ranks.engine = lambda: None
        for table in self._all_tables():
            table.show()

    def engine_begins(self, optimizer: Optimizer) -> None:
        self._rows = RowsOfEngine(optimizer, self.steps)
        for table in self._all_tables():
            table.in_engine_before = True

    def engine_made(self, zero: ZeroSteps) -> None:
        self._zero = zero
        self.ranks.engine = lambda: DataParallel(zero.engine, zero.group, lambda: False) if zero.alive else None

    def before_engine_step(self) -> None:
        self.ranks.average()

    def engine_norm(self) -> Tensor | None:
        return self._rows.norm() if self._rows is not None else None

    def after_engine_step(self, divisor: float) -> None:
        if self._rows is not None:
            self._rows.step(divisor)

    def engine_step_skipped(self) -> None:
        super().engine_step_skipped()
        if self._rows is not None:
            self._rows.forget_gradients()

    # ------------------------------------------------------------------ checkpoints

    def engine_saving(self, folder: str) -> Callable[[], None]:
        """The moments are written by one rank, before the engine names the checkpoint its latest; so are the rows."""
        writes = self._zero is None or self._zero.writes_checkpoints
        if writes:
            optimizer = self._rows.optimizer if self._rows is not None else None
            training_state.save(self._named_tables(), folder, optimizer)
        return _without_rows([] if writes else self._all_tables())

    def engine_loading(self) -> Callable[[], None]:
        """With stage 3, in which each rank reads a file of its own, all get the rows that the first has read."""
        group = self._zero.group if self._zero is not None and self._zero.partitions_parameters else None
        done = _without_rows(self._all_tables() if group is not None and dist.get_rank(group) else [])

        def loaded() -> None:
            done()
            for table in self._all_tables() if group is not None else ():
                table.leave_node()
                broadcast_rows(table, group)  # type: ignore[arg-type]
            self.ranks.forget_shared()

        return loaded

    def engine_loaded(self, folder: str) -> None:
        optimizer = self._rows.optimizer if self._rows is not None else None
        training_state.load(self._named_tables(), folder, optimizer)


def _without_rows(tables: list[RowTable]) -> Callable[[], None]:
    """Let state dicts have no rows of these tables, nor miss them, until what is returned is called."""
    for table in tables:
        table.in_state_dict = False

    def done() -> None:
        for table in tables:
            table.in_state_dict = True

    return done
