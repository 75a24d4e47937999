"""Optimizer steps that torch's hooks do not see, found where compiled code runs the forward pass.

A forward pass that is not compiled compares the rows before it takes them (`MergeUnit.suspicions`). Compiled code
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


class _Bank(Protocol):
    stacked_B: nn.Parameter
    ties: Ties

    @property
    def compared(self) -> bool: ...

    @property
    def was_taken(self) -> bool: ...


class CompiledArrivals:
    """Gradients of a stacked B that came from compiled code since the last step that was seen."""

    def __init__(self, bank: _Bank) -> None:
        self.count = 0
        self._bank: Callable[[], _Bank | None] = weakref.ref(bank)
        if bank.stacked_B.requires_grad:
            bank.stacked_B.register_hook(self._arrived)

    def _arrived(self, gradient: Tensor) -> None:
        """Raises: RuntimeError: rows that share have moved apart between two backward passes."""
        bank = self._bank()
        if bank is None or bank.was_taken or not bank.ties.mirrored:  # a pass that was not compiled has compared them
            return
        if self.count and bank.compared and bool(bank.ties.broken(bank.stacked_B)):
            raise RuntimeError(UNSEEN_STEP)
        self.count += 1
