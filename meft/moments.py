"""What a row optimizer remembers of one table: the moments of its rows, and how often each was touched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .row_update import StepRule, update_rows


@dataclass
class Moments:
    """AdamW's state of a table [r, d] (see `meft.optim`).

    Attributes:
        exp_avg, exp_avg_sq: [r, d], float32 (float64 for float64 masters), where the masters are.
        counts: int32 [r], how often each row was touched.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    counts: Tensor

    @classmethod
    def fresh(cls, table: Tensor) -> Moments:
        """Moments before the first step."""
        dtype = torch.float64 if table.dtype == torch.float64 else torch.float32
        m, v = (torch.zeros(table.shape, dtype=dtype, device=table.device) for _ in range(2))
        return cls(m, v, torch.zeros(len(table), dtype=torch.int32, device=table.device))

    def update(
        self,
        table: Tensor,
        wire: Tensor | None,
        rows: Tensor,
        gradients: Tensor,
        rule: StepRule,
        seed: int,
        step: Callable[..., None] = update_rows,
    ) -> None:
        """One optimizer step with the gradients [n, d] of the rows [n]; all other rows stay as they are.

        Args:
            seed: of the stochastic rounding of bfloat16 masters.
            step: who steps the rows.
        """
        step(table, self.exp_avg, self.exp_avg_sq, self.counts, rows, gradients, rule, wire=wire, seed=seed)

    def move(self, device: torch.device) -> None:
        """Follow a table that has moved."""
        for name in ("exp_avg", "exp_avg_sq", "counts"):
            setattr(self, name, getattr(self, name).to(device))

    def tensors(self) -> dict[str, Tensor]:
        """All of it as tensors, without a copy."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "counts": self.counts}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Any]) -> Moments:
        """The inverse of `tensors`."""
        return cls(tensors["exp_avg"], tensors["exp_avg_sq"], tensors["counts"])
