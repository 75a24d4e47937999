"""What a row optimizer remembers of one table: moments, counts, and in dense mode the steps that rows have missed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .row_update import StepRule, replay_rows, update_rows

# In dense mode the history is replayed into all rows, and forgotten, once it is this long.
LONGEST_HISTORY = 1024


@dataclass
class Moments:
    """AdamW's state of a table [r, d] (see `meft.optim` for the two modes).

    Attributes:
        exp_avg, exp_avg_sq: [r, d], float32 (float64 for float64 masters), where the masters are.
        counts: int32 [r]; lazy: how often the row was touched; dense: the step up to which the row is current.
        dense: whether rows follow the steps that they were not touched in.
        step: the table's own count of optimizer steps.
        history: dense: the rules of the last steps, the newest is that of `step`.
        seed: of the stochastic rounding of bfloat16 masters.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    counts: Tensor
    dense: bool
    step: int = 0
    history: list[StepRule] = field(default_factory=list)
    seed: int = 0

    @classmethod
    def fresh(cls, table: Tensor, *, dense: bool, seed: int) -> Moments:
        """Moments before the first step."""
        dtype = torch.float64 if table.dtype == torch.float64 else torch.float32
        m, v = (torch.zeros(table.shape, dtype=dtype, device=table.device) for _ in range(2))
        return cls(m, v, torch.zeros(len(table), dtype=torch.int32, device=table.device), dense, seed=seed)

    @property
    def lags(self) -> bool:
        """Whether there may be rows that have missed steps."""
        return bool(self.history)

    def update(
        self,
        table: Tensor,
        wire: Tensor | None,
        rows: Tensor,
        gradients: Tensor,
        rule: StepRule,
        step: Callable[..., None] = update_rows,
    ) -> None:
        """One optimizer step with the gradients [n, d] of the rows [n]; zero elsewhere.

        Args:
            step: who steps the rows in lazy mode.
        """
        self.step += 1
        if not self.dense:
            step(table, self.exp_avg, self.exp_avg_sq, self.counts, rows, gradients, rule, wire=wire, seed=self.seed)
            return
        self.history.append(rule)
        self._replay(table, wire, rows, gradients)
        if len(self.history) >= LONGEST_HISTORY:
            self.catch_up(table, wire, None)

    def catch_up(self, table: Tensor, wire: Tensor | None, rows: Tensor | None) -> None:
        """Replay the steps that the rows (None: all) have missed."""
        if not self.history:
            return
        late = self.counts < self.step if rows is None else self.counts[rows] < self.step
        behind = late.nonzero().flatten() if rows is None else rows[late]
        if len(behind):
            self._replay(table, wire, behind, None)
        if rows is None:
            self.history.clear()

    def _replay(self, table: Tensor, wire: Tensor | None, rows: Tensor, gradients: Tensor | None) -> None:
        replay_rows(
            table,
            self.exp_avg,
            self.exp_avg_sq,
            self.counts,
            rows,
            gradients,
            self.history,
            first_step=self.step - len(self.history) + 1,
            wire=wire,
            seed=self.seed,
        )

    def move(self, device: torch.device) -> None:
        """Follow a table that has moved."""
        for name in ("exp_avg", "exp_avg_sq", "counts"):
            setattr(self, name, getattr(self, name).to(device))

    def tensors(self) -> dict[str, Tensor]:
        """All of it as tensors, the big ones without a copy.

        The history is float64 [steps, 6]: lr, beta1, beta2, eps, weight decay, decoupled.
        """
        history = [[h.lr, h.beta1, h.beta2, h.eps, h.weight_decay, float(h.decoupled)] for h in self.history]
        return {
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
            "counts": self.counts,
            "clock": torch.tensor([int(self.dense), self.step, self.seed]),
            "history": torch.tensor(history, dtype=torch.float64).reshape(-1, 6),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Any]) -> Moments:
        """The inverse of `tensors`."""
        dense, step, seed = tensors["clock"].tolist()
        history = [StepRule(a, b, c, d, e, bool(f)) for a, b, c, d, e, f in tensors["history"].tolist()]
        big = (tensors["exp_avg"], tensors["exp_avg_sq"], tensors["counts"])
        return cls(*big, bool(dense), step, history, seed)
