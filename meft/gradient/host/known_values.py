"""What is known of the values of a gradient that were drained, for as long as nobody else writes into them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peft_bridge.torch_private import become

from ...table.watched_rows import Watch, WatchedRows, unwatched
from .drain import row_squares, total

_LEAST, _MOST = 2.0**-80, float(torch.finfo(torch.float32).max)


class KnownValues:
    """The sum of the squares of values [n, d], float32; that it is finite says that all of them are.

    torch's version counter notices who writes into the values or a view of them, `watched_rows` who gets hold of the
    memory in a way that it does not count (`.data`, an array). Operations on the gradient itself call `forget`.

    Args:
        earlier: what was known of other values in the same memory.
    """

    def __init__(self, earlier: KnownValues | None = None) -> None:
        self.watch: Watch = Watch(torch.float32, True) if earlier is None else earlier.watch
        self._handed_out = self.watch.handed_out
        self._version: int | None = None  # of the values when they landed
        self._sums: Tensor | None = None  # of the squares of each row
        self._squares: float | None = None
        self._forgotten = False

    def land(self, values: Tensor, sum_of_squares: float | None = None, sums: Tensor | None = None) -> None:
        """The values are there, and nobody has seen them; without a sum it is taken when it is asked for.

        Args:
            sums: of each row.
        """
        if self._version is None:
            self._version, self._sums, self._squares = values._version, sums, sum_of_squares

    def of_equal(self, values: Tensor, wider: Tensor) -> KnownValues:
        """The same of equal values in memory that nobody has seen."""
        known = KnownValues()
        if self.holds(values):
            known.land(wider, self._squares, self._sums)
        else:
            known.land(wider)
        return known

    def forget(self) -> None:
        """The values will be others."""
        self._forgotten = True

    def holds(self, values: Tensor) -> bool:
        """Whether nobody has written into the values since."""
        same = values._version == self._version and self.watch.handed_out is self._handed_out
        return same and not self._forgotten

    def squares_of(self, values: Tensor, factors: tuple[float, ...] = ()) -> float | None:
        """The sum of the squares of the values times the factors; None where it is not known and cannot be."""
        if not self.holds(values):
            return None
        if self._squares is None:
            self._squares = total(self.row_squares(values))
        return None if self._squares is None else times(self._squares, factors)

    def row_squares(self, values: Tensor) -> Tensor | None:
        """The sum of the squares of each row, float64 [n]; None where it is not known and cannot be."""
        if not self.holds(values):
            return None
        if self._sums is None:
            self._sums = row_squares(values)
        return self._sums

    def allows(self, values: Tensor, factors: tuple[float, ...]) -> bool:
        """Whether the values times the factors stay finite, and not so small that their norm would be another one."""
        return self.holds(values) and self._squares is not None and stays_normal(self._squares, factors)

    def watched(self, values: Tensor) -> Tensor:
        """An alias of the values that tells who gets hold of their memory."""
        alias = unwatched(values)
        become(alias, WatchedRows, is_parameter=False)
        alias.watch = self.watch  # type: ignore[attr-defined]
        return alias


def times(sum_of_squares: float, factors: tuple[float, ...]) -> float:
    """The sum of the squares of values that are multiplied by factors."""
    return sum_of_squares * math.prod(factor**2 for factor in factors)


def stays_normal(sum_of_squares: float, factors: tuple[float, ...]) -> bool:
    """Whether values times the factors stay finite, and not so small that their norm would be another one."""
    if not math.isfinite(sum_of_squares):
        return False
    norm = math.sqrt(sum_of_squares)
    for factor in factors:
        norm *= abs(factor)
        if norm and not _LEAST < norm < _MOST:
            return False
    return True
