"""A table of which the ranks of a node have one copy: all read it, and each steps its share of the touched rows.

Nobody writes before all ranks have entered the step, which they do once they read no more; nobody reads before all are
through with it. Users get a view of the masters and the moments in which what they write stays in their process: a
rank that finds such writes goes on with a copy of its own, as after any other write.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_kernels.adamw.moment_layout import moment_forms

from ..transport.node_ranks import NodeRanks, wake
from ..transport.shared_memory import Layout, SharedMemory
from .moments import Moments, RowMoments

_COUNTERS = 5  # of each rank

IN_A_STEP = (
    "MEFT's rows were written in the middle of an optimizer step, in which other ranks update them: write into them "
    "before or after the step (`synchronize()` of their table waits for one that is queued)."
)


class RankLeftError(Exception):
    """A rank of the node goes on with rows of its own: all have to."""


@dataclass(frozen=True)
class NodePlaces:
    """Where a table [r, d] is in shared memory.

    Attributes:
        compute_dtype: in which rows are read.
        mode: how moments are kept.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    compute_dtype: torch.dtype
    masters: int
    compute_copy: int | None
    moments: tuple[int, ...]
    counters: int
    mode: str = "float32"

    @classmethod
    def plan(
        cls,
        layout: Layout,
        shape: tuple[int, int],
        dtype: torch.dtype,
        compute_dtype: torch.dtype,
        ranks: int,
        mode: str = "float32",
    ) -> NodePlaces:
        """Take places for a table with these dtypes."""
        values = shape[0] * shape[1]
        forms = moment_forms(mode, shape, dtype).values()
        narrower = compute_dtype != dtype
        return cls(
            shape, dtype, compute_dtype,
            masters=layout.place(values * dtype.itemsize),
            compute_copy=layout.place(values * compute_dtype.itemsize) if narrower else None,
            moments=tuple(layout.place(math.prod(size) * kept.itemsize) for size, kept in forms),
            counters=layout.place(8 * _COUNTERS * ranks),
            mode=mode,
        )  # fmt: skip


class NodeRows:
    """One rank's view of a shared table.

    Args:
        position: of the table among `tables` that the ranks step together.

    Attributes:
        masters: to read and to write; `private_masters` is what users get.
        moments: those of the optimizer that steps the rows on all ranks.
        unused: whether they are zeros of which no optimizer has made use.
        steps: steps that this rank has done.
        entered: whether it has entered the next one.
    """

    def __init__(
        self, ranks: NodeRanks, memory: SharedMemory, places: NodePlaces, position: int = 0, tables: int = 1
    ) -> None:
        self.ranks, self.places = ranks, places
        assert memory.private is not None
        self._memory, self._view = memory, memory.private
        self._of_moments = places.moments[0], places.counters - places.moments[0]  # offset and bytes
        forms = moment_forms(places.mode, places.shape, places.dtype).items()
        found = zip(places.moments, forms, strict=True)
        parts = [(at, name, shape, dtype) for at, (name, (shape, dtype)) in found]
        self.moments = Moments(**{name: memory.tensor(at, shape, dtype) for at, name, shape, dtype in parts})
        self.moments.for_users = Moments(
            **{name: memory.tensor(at, shape, dtype, private=True) for at, name, shape, dtype in parts}
        )
        self.unused, self.steps, self.entered = True, 0, False
        self._position, self._tables = position, tables
        self._looked = 0  # steps after which writes were looked for
        n, numbers = len(ranks), memory.numbers(places.counters, _COUNTERS * len(ranks))
        counters = [numbers[i * n : (i + 1) * n] for i in range(_COUNTERS)]
        self._entered, self._done, self._brings, self._brought, self._left = counters
        self.masters = memory.tensor(places.masters, places.shape, places.dtype)
        self._address = self.private_masters().data_ptr()

    def private_masters(self) -> Tensor:
        """The masters, as a tensor without other users."""
        return self._memory.tensor(self.places.masters, self.places.shape, self.places.dtype, private=True)

    def compute_copy(self) -> Tensor | None:
        """The narrower copy that is read, as a tensor without other users."""
        p = self.places
        return None if p.compute_copy is None else self._memory.tensor(p.compute_copy, p.shape, p.compute_dtype)

    def has(self, masters: Tensor) -> bool:
        """Whether these are the `private_masters`."""
        return masters.data_ptr() == self._address

    def holds(self, masters: Tensor, compute_dtype: torch.dtype) -> bool:
        """Whether a table that has these masters, and is read so, is still the one that is shared."""
        return self.has(masters) and compute_dtype == self.places.compute_dtype

    def written(self) -> bool:
        """Whether this process has written into the `private_masters`."""
        return self._view.written(self.places.masters, self.masters.nbytes)

    def _moments_written(self) -> bool:
        return self._view.written(*self._of_moments)

    # ------------------------------------------------------------------ steps

    def part(self, count: int) -> slice:
        """This rank's share of `count` rows of the table.

        All tables have as few parts as give all ranks as many of them: mostly one, whose rows and moments are one
        rank's then.
        """
        stepping = self.ranks.stepping
        parts = len(stepping) // math.gcd(len(stepping), self._tables)
        number = (stepping.index(self.ranks.rank) - self._position * parts) % len(stepping)
        if number >= parts:
            return slice(0, 0)
        return slice(count * number // parts, count * (number + 1) // parts)

    def wait(self) -> None:
        """Wait for the other ranks' parts of the steps that this one has done.

        Raises:
            RuntimeError: a rank has ended or failed, or has not come in time.
        """
        self.ranks.wait(self._done, self.steps, among=self.ranks.stepping)
        if self._looked == self.steps:
            return
        self._looked = self.steps
        with self._failing():
            self._check_not_written()

    def _check_not_written(self) -> None:
        """Other ranks update rows on the same pages in a step. Raises: RuntimeError: this process has written there."""
        p = self.places
        if self._view.written(p.masters, p.counters - p.masters):
            raise RuntimeError(IN_A_STEP)

    def enter(self, entry: RowMoments) -> None:
        """Tell the others that this rank reads the rows no more until it has done its part of the next step: each may
        write then. A step of several tables enters all of them before it waits for the first.

        Args:
            entry: of this rank's optimizer.
        """
        with self._failing():
            self._release_to_others(entry)
            if self._moments_written():
                if entry.holds(self.moments):
                    entry.hold(self._copy_of_moments())
                self._view.forget(*self._of_moments)
            self.unused, self.entered = False, True
            self.ranks.publish(self._brings, 0 if entry.holds(self.moments) else 1)
            self.ranks.publish(self._entered, self.steps + 1)

    @contextmanager
    def turn(self, entry: RowMoments) -> Iterator[Moments]:
        """This rank's part of a step: yields the moments once no rank reads rows any more.

        Args:
            entry: as `enter` got it; it has the yielded moments from then on.

        Raises:
            RankLeftError: a rank has left before this step, of which no rank has written anything then.
        """
        if not self.entered:
            self.enter(entry)
        with self._failing():
            number, stepping = self.steps + 1, self.ranks.stepping
            if not self.ranks.wait(self._entered, number, among=stepping, left=self._left):
                self.entered = False
                raise RankLeftError
            bringing = [rank for rank in stepping if self._brings[rank]]  # all ranks see the same
            if bringing:
                self._bring(entry, number, bringing)
            yield self.moments
            self._check_not_written()
            self.steps, self.entered = number, False
            self.ranks.publish(self._done, number)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except RankLeftError:
            raise
        except BaseException:
            self.ranks.fail()
            raise

    def _release_to_others(self, entry: RowMoments) -> None:
        """A state dict that was kept, or another optimizer, gets a copy of its own before anybody writes."""
        others = [holder for holder in self.moments.holders if holder is not entry]
        if others:
            kept = self._copy_of_moments()
            for holder in others:
                holder.hold(kept)

    def _copy_of_moments(self) -> Moments:
        """With what this process has written into them."""
        assert self.moments.for_users is not None
        return self.moments.for_users.clone()

    def release(self) -> None:
        """This rank goes on with rows and moments of its own.

        Raises:
            RuntimeError: it is in the middle of a step, of which others may have written their parts.
        """
        if self.entered:
            self.ranks.fail()
            raise RuntimeError(IN_A_STEP)
        if self.moments.holders:
            kept = self._copy_of_moments()
            for holder in list(self.moments.holders):
                holder.hold(kept)
        self.ranks.publish(self._left, 1)
        wake(self._entered, self.ranks.rank)  # who waits there for this rank

    def _bring(self, entry: RowMoments, number: int, bringing: list[int]) -> None:
        """Moments that were loaded, or are fresh, replace those in shared memory; each rank that has them copies some
        rows.
        """
        if not entry.holds(self.moments):
            own, count, place = entry.held.tensors(), self.places.shape[0], bringing.index(self.ranks.rank)
            rows = slice(count * place // len(bringing), count * (place + 1) // len(bringing))
            for name, shared in self.moments.tensors().items():
                shared[rows].copy_(own[name][rows])
            entry.hold(self.moments)
        self.ranks.publish(self._brought, number)
        self.ranks.wait(self._brought, number, among=self.ranks.stepping)

    # ------------------------------------------------------------------ steps of the others

    def stay_out(self, entry: RowMoments | None) -> None:
        """The others step without this rank from now on: what has kept moments here gets a copy of its own.

        Args:
            entry: of this rank's optimizer, which has the moments of the others.
        """
        if entry is not None:
            self._release_to_others(entry)

    def catch_up(self) -> None:
        """Count the steps as done that the others have done without this rank."""
        self.steps = self._looked = max(self._done)
        self.unused = False
        for numbers in (self._entered, self._done):
            self.ranks.publish(numbers, self.steps)
