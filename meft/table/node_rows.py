"""A table of which the ranks of a node have one copy: all read it, and each steps its share of the touched rows.

Nobody writes before all ranks have entered the step, which they do once they read no more; nobody reads before all are
through with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_kernels.adamw.moment_layout import moment_forms

from ..transport.node_ranks import NodeRanks
from ..transport.shared_memory import Layout, SharedMemory
from .moments import Moments, RowMoments

_COUNTERS = 5  # of each rank


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

    Attributes:
        masters: address of the masters.
        moments: those of the optimizer that steps the rows on all ranks.
        unused: whether they are zeros of which no optimizer has made use.
        steps: steps that this rank has done.
    """

    def __init__(self, ranks: NodeRanks, memory: SharedMemory, places: NodePlaces) -> None:
        self.ranks, self.places = ranks, places
        self._memory = memory
        forms = moment_forms(places.mode, places.shape, places.dtype).items()
        found = zip(places.moments, forms, strict=True)
        self.moments = Moments(**{name: memory.tensor(at, shape, dtype) for at, (name, (shape, dtype)) in found})
        self.unused, self.steps = True, 0
        n, numbers = len(ranks), memory.numbers(places.counters, _COUNTERS * len(ranks))
        parts = [numbers[i * n : (i + 1) * n] for i in range(_COUNTERS)]
        self._entered, self._done, self._brings, self._brought, self._left = parts
        self.masters = memory.tensor(places.masters, places.shape, places.dtype).data_ptr()

    def tensors(self) -> tuple[Tensor, Tensor | None]:
        """Masters, and the narrower copy that is read, as tensors without other users."""
        p, at = self.places, self.places.compute_copy
        copy = None if at is None else self._memory.tensor(at, p.shape, p.compute_dtype)
        return self._memory.tensor(p.masters, p.shape, p.dtype), copy

    def holds(self, masters: Tensor, compute_dtype: torch.dtype) -> bool:
        """Whether a table that has these masters, and is read so, is still the one that is shared."""
        return masters.data_ptr() == self.masters and compute_dtype == self.places.compute_dtype

    # ------------------------------------------------------------------ steps

    def wait(self) -> None:
        """Wait for the other ranks' parts of the steps that this one has done.

        Raises:
            RuntimeError: a rank has ended or failed, or has not come in time.
        """
        self.ranks.wait(self._done, self.steps)

    @contextmanager
    def turn(self, entry: RowMoments) -> Iterator[Moments]:
        """This rank's part of a step: yields the moments once no rank reads rows any more.

        Args:
            entry: of this rank's optimizer; it has the yielded moments from then on.

        Raises:
            RankLeftError: a rank has left before this step, of which no rank has written anything then.
        """
        try:
            self._release_to_others(entry)
            number = self.steps + 1
            self.unused = False
            self.ranks.publish(self._brings, 0 if entry.holds(self.moments) else 1)
            self.ranks.publish(self._entered, number)
            if not self.ranks.wait(self._entered, number, left=self._left):
                raise RankLeftError
            if any(self._brings):  # all ranks see the same
                self._bring(entry, number)
            yield self.moments
            self.steps = number
            self.ranks.publish(self._done, number)
        except RankLeftError:
            raise
        except BaseException:
            self.ranks.fail()
            raise

    def _release_to_others(self, entry: RowMoments) -> None:
        """A state dict that was kept, or another optimizer, gets a copy of its own before anybody writes."""
        others = [holder for holder in self.moments.holders if holder is not entry]
        if others:
            kept = self.moments.clone()
            for holder in others:
                holder.hold(kept)

    def release(self) -> None:
        """This rank goes on with rows and moments of its own."""
        if self.moments.holders:
            kept = self.moments.clone()
            for holder in list(self.moments.holders):
                holder.hold(kept)
        self.ranks.publish(self._left, 1)

    def _bring(self, entry: RowMoments, number: int) -> None:
        """Moments that were loaded, or are fresh, replace those in shared memory; each rank copies some rows."""
        if not entry.holds(self.moments):
            own, rows = entry.held.tensors(), self.ranks.part(self.places.shape[0])
            for name, shared in self.moments.tensors().items():
                shared[rows].copy_(own[name][rows])
            entry.hold(self.moments)
        self.ranks.publish(self._brought, number)
        self.ranks.wait(self._brought, number)
