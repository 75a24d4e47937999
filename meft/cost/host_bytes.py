"""What the host reads and writes for the gradients of rows in its memory, from the link to the next forward pass.

What the code does, counted in it by tests/meft/test_host_bytes.py: with float32 masters, the C++ library, and gradients
that nobody else looks at or changes. It is the least: a processor that reads a cache line before it writes it moves 4
bytes more for each gradient and as many as a value of the narrower copy has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .memory import FP32, Plan


@dataclass(frozen=True)
class HostBytes:
    """Bytes of one layer, keys and values; none where nothing is on the host."""

    plan: Plan

    @property
    def _nothing(self) -> bool:
        return self.plan.way.updates_on_device

    def _rows(self, micro_batches: int) -> int:
        """Distinct neurons of the first micro-batches of a step, as different as they can be."""
        return min(self.plan.step_union, micro_batches * self.plan.work.union)

    def drained(self, micro_batch: int) -> int:
        """Of a micro-batch's gradients: copied into memory of their own, then added to those before."""
        if self._nothing:
            return 0
        width, union = 2 * self.plan.shape.d, self.plan.work.union
        each = width * union * (self.plan.shape.gradient + self.plan.kept_gradient)
        return each + (width * FP32 * self._moved_by_adding(micro_batch) if micro_batch else 0)

    def _moved_by_adding(self, micro_batch: int) -> int:
        """Values that are read or written, over the width of a row."""
        there, union = self._rows(micro_batch), self.plan.work.union
        new = self._rows(micro_batch + 1) - there
        if not new:
            return 3 * union
        room = union
        for earlier in range(1, micro_batch):
            room = self._room(room, earlier)
        moved = 2 * there if there + new > room else 0  # to where there is room for more
        return moved + 5 * (union - new) + 2 * new

    def _room(self, room: int, micro_batch: int) -> int:
        there, wanted = self._rows(micro_batch), self._rows(micro_batch + 1)
        return room if wanted <= room else min(self.plan.shape.r, max(wanted, 2 * there))

    def looked_at(self) -> int:
        """Of a step's gradients: a sum of squares for the norm and for finiteness, which the drain of a single
        micro-batch has, and the order of rows that came in turn."""
        if self._nothing or self.plan.work.accumulation == 1:
            return 0
        sorted_ = 2 * FP32 if self.plan.step_union > self.plan.work.union else 0
        return 2 * self.plan.shape.d * self.plan.step_union * (FP32 + sorted_)

    @property
    def read_gradient(self) -> int:
        """Bytes of a value of the gradient that the update reads."""
        return self.plan.kept_gradient

    @property
    def stepped(self) -> int:
        """Rows of a layer that are updated in a step, of keys and as many of values."""
        return self.plan.step_union

    def updated(self) -> int:
        """Of a step's update, wherever it is: gradient, master, both moments and the narrower copy."""
        return self.of_rows(self.stepped, self.read_gradient)

    def of_rows(self, neurons: float, gradient: int = FP32) -> Any:
        """Of the update of some neurons' rows by gradients of so many bytes a value."""
        s = self.plan.shape
        each = gradient + 2 * s.master + (s.compute if s.compute < s.master else 0)
        return 2 * neurons * (s.d * each + 2 * s.row_moments)
