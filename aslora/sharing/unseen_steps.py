"""Optimizer steps that torch's hooks do not see, found where compiled code runs the forward pass.

A forward pass that is not compiled compares the rows before it takes them (`MergeUnit.change_flags`). Compiled code
cannot, so the comparison is made when a gradient arrives and another one has arrived since the last step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from .ties import Ties

UNSEEN_STEP = (
    "B has changed after a backward pass, but torch's optimizer hooks saw no step, so layers that share would go on "
    "with different B: call model.base_model.update_and_allocate(step) after each step of this optimizer (and load "
    "values with load_state_dict, not between backward and step)."
)


class _StackedRows(Protocol):
    stacked_B: nn.Parameter
    ties: Ties

    @property
    def compared(self) -> bool: ...

    @property
    def rows_taken(self) -> bool: ...


class CompiledBackwardPasses:
    """Gradients of a stacked B that came from compiled code since the last step that was seen."""

    def __init__(self, rows: _StackedRows) -> None:
        self.count = 0
        self._rows: Callable[[], _StackedRows | None] = weakref.ref(rows)
        if rows.stacked_B.requires_grad:
            rows.stacked_B.register_hook(self._gradient_hook)

    def _gradient_hook(self, gradient: Tensor) -> None:
        """Raises: RuntimeError: rows that share have moved apart between two backward passes."""
        rows = self._rows()
        if rows is None or rows.rows_taken or not rows.ties.mirrored:  # a pass that was not compiled has compared them
            return
        if self.count and rows.compared and bool(rows.ties.broken(rows.stacked_B)):
            raise RuntimeError(UNSEEN_STEP)
        self.count += 1
