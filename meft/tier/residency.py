"""Which rows of an adapter's layers are worth a place on the device: decayed counts of the steps that used them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DECAY = 0.9  # of a count, a step
EVERY = 8  # steps between two choices
HOLD = 0.2  # by so much must the count of a row exceed that of one which has a place, to get its place


class Moves(NamedTuple):
    """Rows that change their place, numbered through all layers (layer r + row): int64, ascending.

    Attributes:
        leave: back to the host. enter: to the device; the places of those that leave are free for them.
    """

    leave: Tensor
    enter: Tensor


class Residency:
    """Counts, and the choice that follows from them, for all layers out of one budget.

    It looks at what was used and never ahead: picks depend on activations.

    Args:
        layers, r: layers, and rows of each.
    """

    def __init__(self, layers: int, r: int) -> None:
        self.layers, self.r = layers, r
        self._scores = torch.zeros(layers * r, dtype=torch.float32, device="cpu")
        self._used = torch.zeros(layers * r, dtype=torch.bool, device="cpu")
        self._wanted = torch.zeros(0, dtype=torch.int64, device="cpu")
        self._steps = 0

    @property
    def is_due(self) -> bool:
        """Whether the next `end_step` chooses anew."""
        return self._steps % EVERY == 0

    def note(self, layer: int, rows: Tensor) -> None:
        """Rows of a layer, int64, are used in the step that goes on."""
        self._used[layer * self.r : (layer + 1) * self.r][rows] = True

    def end_step(self, places: int, resident: Tensor, allowed: Tensor) -> None:
        """A step is over: count what it used, and choose anew every `EVERY` steps, from the first one on.

        Args:
            places: rows that there is room for.
            resident: bool [layers r], rows that have a place: they keep it where counts are not much lower.
            allowed: bool [layers r], rows that may have one.
        """
        self._scores.mul_(DECAY).add_(self._used)
        self._used.zero_()
        if self.is_due:
            scores = torch.where(allowed & (self._scores > 0), self._scores * (1 + HOLD * resident), 0.0)
            best = scores.topk(min(places, len(scores)), sorted=True)
            self._wanted = best.indices[best.values > 0]
        self._steps += 1

    def moves(self, places: int, resident: Tensor, allowed: Tensor, most: int) -> Moves:
        """The next moves towards the last choice.

        Args:
            places, resident, allowed: as in `end_step`.
            most: rows that may enter; the most used ones come first, and the least used ones leave first.
        """
        wanted = self._wanted[allowed[self._wanted]]
        enter = wanted[~resident[wanted]][:most]
        free = places - int(resident.sum())
        if len(enter) > free:
            extra = resident.clone()
            extra[wanted] = False
            leave = extra.nonzero().flatten()
            leave = leave[self._scores[leave].argsort()][: len(enter) - free]
        else:
            leave = enter[:0]
        return Moves(leave.sort().values, enter[: free + len(leave)].sort().values)
