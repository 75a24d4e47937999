"""What a row gradient and its aliases share."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..transport.host_tensors import check_process
from .host.accumulator import Landed, Pending, Stored
from .host.known_values import KnownValues, times
from .split import Divided


@dataclass(eq=False)
class HeldValues:
    """What a gradient and its aliases (`.data`, `.detach()`) share.

    Attributes:
        in_use: whether a queued update reads it.
        known: of values that were drained.
        forks: the value of `host_tensors.forks` then.
        factors: float32 numbers, at most two, that the values still have to be multiplied by, in their order: the
            update multiplies as it reads them, and every other access multiplies them first.
        sharers: of all gradients that have these values, taken over from one another.
    """

    stored: Stored
    consumed: bool
    in_use: bool = False
    known: KnownValues | None = None
    forks: int | None = None
    factors: tuple[float, ...] = ()
    sharers: weakref.WeakSet[HeldValues] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy or a pickle, which has memory of its own."""
        stored = self.stored.result() if isinstance(self.stored, Pending) else self.stored
        return {"stored": stored, "consumed": self.consumed, "factors": self.factors}

    def landed(self) -> Landed:
        """Rows and values, once they have come."""
        if self.forks is not None:
            check_process(self.forks)
        if isinstance(self.stored, Pending):
            if isinstance(self.stored, Divided) and self.known is not None:
                self.known = KnownValues()  # of values in other memory
            with torch.inference_mode(False):  # values outlive the mode
                self.stored = self.stored.result()
            if self.known is not None:
                self.known.land(self.stored[1])
        return self.stored

    def squares(self) -> float | None:
        """The sum of the squares of all values in double, finite if and only if they are; None: read them."""
        if isinstance(self.stored, Divided):
            found = self.stored.squares(self.known)
            return None if found is None else times(found, self.factors)
        _, values = self.landed()
        return None if self.known is None else self.known.squares_of(values, self.factors)

    def unshare(self, rows: Tensor, values: Tensor, known: KnownValues | None = None) -> None:
        """Replace shared values by values of its own."""
        self.stored, self.known, self.factors, self.in_use = (rows, values), known, (), False
        self.leave()

    def leave(self) -> None:
        """Have no sharers any more."""
        if self.sharers is not None:
            self.sharers.discard(self)
            self.sharers = None

    @property
    def shared(self) -> bool:
        """Whether an update or another gradient reads the values: they must not be written."""
        return self.in_use or (self.sharers is not None and any(held is not self for held in self.sharers))
