"""What a row gradient and its aliases share."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from .host.accumulator import Pending, Stored
from .host.known_values import KnownValues


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

    @property
    def shared(self) -> bool:
        """Whether an update or another gradient reads the values: they must not be written."""
        return self.in_use or (self.sharers is not None and any(held is not self for held in self.sharers))
