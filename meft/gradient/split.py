"""Gradients of which some rows stay on the device, where a tier steps them, while the others leave for the host.

Whatever looks at the values, or changes them, finds all of them on the host: `Divided.result` brings the others home
and puts them in the order of the rows. What a training step needs does without: sums over micro-batches, the norm,
factors, the step.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..transport.staging import Coming, Slot, sent
from ..transport.streams import DeviceStreams
from .host import accumulator
from .host.accumulator import Landed, Pending, Stored
from .host.drain import row_squares, total
from .host.known_values import KnownValues, stays_normal


@dataclass(eq=False)
class DevicePart:
    """Gradients of the rows that are on the device.

    Attributes:
        rows: int64 [H] in host memory, ascending, all rows of the table that are on the device; the same object for as
            long as they are the same.
        touched: int64 [h] in host memory, ascending: which of them have a gradient, by their number in `rows`.
        values: on the device, [h, d] as they were made, or sums of several, [H, d].
        numbers: `touched` on the device; None with sums.
        dtype: in which they are added up and stepped.
        slots: staging memory, which parts share.
    """

    streams: DeviceStreams
    rows: Tensor
    touched: Tensor
    values: Tensor
    numbers: Tensor | None
    dtype: torch.dtype
    slots: list[Slot] = field(repr=False)
    _coming: Coming | None = field(default=None, init=False, repr=False)
    _squares: Tensor | None = field(default=None, init=False, repr=False)
    # The thread of the updates and an optimizer's step may ask at the same time.
    _asked: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def plus(self, other: DevicePart, *, in_place: bool) -> DevicePart:
        """The sum of the gradients of two passes.

        Args:
            in_place: whether this one has no other user, so that its memory may take the sum.
        """
        sums = self.values
        if self.numbers is not None:
            sums = self.values.new_zeros(len(self.rows), *self.values.shape[1:], dtype=self.dtype)
            sums.index_copy_(0, self.numbers.to(torch.int64), self.values.to(self.dtype))
        elif not in_place:
            sums = sums.clone()
        if other.numbers is None:
            sums.add_(other.values)
        else:
            sums.index_add_(0, other.numbers, other.values.to(self.dtype))
        touched = accumulator.union(self.touched, other.touched, len(self.rows))
        return DevicePart(self.streams, self.rows, touched, sums, None, self.dtype, self.slots)

    def numbers_on_device(self) -> Tensor:
        """Numbers of the touched rows, [h]."""
        if self.numbers is not None:
            return self.numbers
        numbers, arrival = sent(self.streams, self.touched.to(torch.int32), self.slots)
        self.streams.wait_event(arrival)
        self.streams.use([numbers])
        return numbers

    def some(self, numbers: Tensor, block: slice = slice(None)) -> Tensor:
        """Gradients of some touched rows, [n, d] in `dtype`, on the device.

        Args:
            numbers: what `numbers_on_device` gives.
        """
        if self.numbers is not None:
            return self.values[block].to(self.dtype)
        return self.values.index_select(0, numbers[block])

    def home(self) -> Landed:
        """Rows and values in host memory."""
        coming = Coming(self.streams, [self.some(self.numbers_on_device())], self.slots)
        return self.rows[self.touched], coming.wait()[0].clone()

    def begin_squares(self) -> bool:
        """Queue what `squares` waits for, in the order of the computation; False where there is none (float64)."""
        if self._coming is None and self.dtype == torch.float32:
            found = row_squares(self.some(self.numbers_on_device()))
            assert found is not None
            self._coming = Coming(self.streams, [found], self.slots)
        return self.dtype == torch.float32

    def squares(self) -> Tensor | None:
        """The sum of the squares of each touched row, float64 [h] in host memory; None for float64."""
        with self._asked:
            if self._squares is None and self.begin_squares():
                assert self._coming is not None
                self._squares = self._coming.wait()[0].clone()
            return self._squares


class Divided(Pending):
    """Rows and values of which some are on the device.

    Attributes:
        cold: those that leave for the host.
        part: the others.
    """

    def __init__(self, cold: Stored, part: DevicePart) -> None:
        self.cold, self.part = cold, part
        self._total: float | None = None

    def on_host(self) -> Landed:
        """Those that have left."""
        if isinstance(self.cold, Pending):
            self.cold = self.cold.result()
        return self.cold

    def landed(self) -> Landed:
        """All of them, in host memory."""
        rows, values = self.on_host()
        if not len(self.part.touched):
            return rows, values
        other_rows, other_values = self.part.home()
        rows, order = torch.cat([rows, other_rows]).sort()
        return rows, torch.cat([values, other_values]).index_select(0, order)

    def squares(self, known: KnownValues | None) -> float | None:
        """The sum of the squares of all values, added up in the order of the rows wherever they are.

        Args:
            known: of the values on the host.
        """
        if known is None:
            return None
        rows, values = self.on_host()
        known.land(values)
        if self._total is None:
            sums, others = known.row_squares(values), self.part.squares()
            if sums is None or others is None:
                return None
            order = torch.cat([rows, self.part.rows[self.part.touched]]).argsort()
            self._total = total(torch.cat([sums, others])[order])
        return self._total

    def allows(self, factors: tuple[float, ...]) -> bool:
        """As `KnownValues.allows`, once the sum of the squares was asked for."""
        return self._total is not None and stays_normal(self._total, factors)


def merged(a: Stored, b: Stored, most: int, *, in_place: bool) -> Stored:
    """As `accumulator.merged`, of gradients that may be divided."""
    if isinstance(a, Divided) and isinstance(b, Divided) and a.part.rows is b.part.rows:
        cold = accumulator.merged(a.cold, b.cold, most, in_place=in_place)
        return Divided(cold, a.part.plus(b.part, in_place=in_place))
    a, b = (s.result() if isinstance(s, Divided) else s for s in (a, b))
    return accumulator.merged(a, b, most, in_place=in_place)
