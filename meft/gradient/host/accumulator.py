"""Row gradients that land on the host while the backward pass goes on, and sums of them over micro-batches."""

from __future__ import annotations

from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

Landed = tuple[Tensor, Tensor]  # int64 [n], rows, ascending; [n, d], their values


class RowSums:
    """Sums in memory with room for rows to come, so that a micro-batch costs its own rows and not those of all.

    Args:
        first: rows and values; new memory is taken for them with the first row that is not among them.
        most: rows of the table.
    """

    def __init__(self, first: Landed, most: int) -> None:
        rows, self._values = first[0], widened(first[1])
        self._rows = [rows]
        self._count, self._most = len(rows), most
        self._index = torch.full((most,), -1, dtype=torch.int64, device=rows.device)
        self._index[rows] = torch.arange(len(rows), device=rows.device)

    def add(self, landed: Landed) -> RowSums:
        """Add the gradients of some rows."""
        rows, values = landed[0], widened(landed[1])
        index = self._index[rows]
        new = index < 0
        if not bool(new.any()):
            self._values[: self._count].index_add_(0, index, values)
            return self
        known, fresh = (~new).nonzero().flatten(), new.nonzero().flatten()
        self._make_room(self._count + len(fresh))
        self._values.index_add_(0, index[known], values[known])
        end = self._count + len(fresh)
        torch.index_select(values, 0, fresh, out=self._values[self._count : end])
        self._index[rows[fresh]] = torch.arange(self._count, end, device=rows.device)
        self._rows.append(rows[fresh])
        self._count = end
        return self

    def _make_room(self, rows: int) -> None:
        if rows <= len(self._values):
            return
        larger = self._values.new_empty(min(self._most, max(rows, 2 * self._count)), *self._values.shape[1:])
        larger[: self._count] = self._values[: self._count]
        self._values = larger

    def whole(self) -> Landed:
        """All rows in ascending order, and their sums."""
        rows, values = torch.cat(self._rows), self._values[: self._count]
        if len(self._rows) == 1:
            return rows, values
        rows, order = rows.sort()
        return rows, values.index_select(0, order)


def widened(values: Tensor) -> Tensor:
    """Values as they are changed and added up: those that came in bfloat16 in float32."""
    return values.to(torch.float32) if values.dtype == torch.bfloat16 else values


def whole_of(stored: Landed | RowSums) -> Landed:
    """Rows and values, of sums too."""
    return stored.whole() if isinstance(stored, RowSums) else stored


@dataclass(frozen=True)
class Pending:
    """Rows and values that a thread is copying to the host.

    Attributes:
        future: what it will have.
        thread: does what is queued in its order, so that what builds on `future` can be queued at once.
    """

    future: Future[Landed] | Future[Landed | RowSums]
    thread: Executor

    def landed(self) -> Landed | RowSums:
        """Raises: RuntimeError: the copy failed."""
        try:
            return self.future.result()
        except Exception as error:
            raise RuntimeError(f"Gradients of MEFT rows did not arrive: {error}") from error

    def result(self) -> Landed:
        """As `landed`, in ascending order of the rows."""
        return whole_of(self.landed())


Stored = Landed | Pending


def merged(a: Stored, b: Stored, most: int, *, in_place: bool) -> Stored:
    """The sum of two gradients of a table, of which either may still arrive.

    Args:
        most: rows of the table.
        in_place: whether `a` has no other user, so that its memory may take the sum.
    """
    waits = [s for s in (b, a) if isinstance(s, Pending)]
    if not waits:
        return _sum(a, b)  # type: ignore[arg-type]

    def merge() -> Landed | RowSums:
        first, second = (s.landed() if isinstance(s, Pending) else s for s in (a, b))
        if not in_place:
            return _sum(whole_of(first), whole_of(second))
        sums = first if isinstance(first, RowSums) else RowSums(first, most)
        return sums.add(whole_of(second))

    # By the thread of the later one, behind it, so that micro-batches are added up as they land.
    for pending in waits:
        with suppress(RuntimeError):  # a thread that has ended with its engine takes no more work
            return Pending(pending.thread.submit(merge), pending.thread)
    return whole_of(merge())


def _sum(a: Landed, b: Landed) -> Landed:
    a, b = (a[0], widened(a[1])), (b[0], widened(b[1]))
    if torch.equal(a[0], b[0]):
        return a[0], a[1] + b[1]
    rows, inverse = torch.cat([a[0], b[0]]).unique(return_inverse=True)
    values = a[1].new_zeros(len(rows), *a[1].shape[1:])
    values.index_copy_(0, inverse[: len(a[0])], a[1])
    values.index_add_(0, inverse[len(a[0]) :], b[1])
    return rows, values


def union(a: Tensor, b: Tensor, most: int) -> Tensor:
    """The numbers below `most` that are in either, ascending; int64, in host memory."""
    flags = torch.zeros(most, dtype=torch.bool, device="cpu")
    flags[a] = flags[b] = True
    return flags.nonzero().flatten()
