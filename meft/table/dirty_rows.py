"""Dirty rows: those of a table that have changed since they were copied to a device."""

from __future__ import annotations

import torch
from torch import Tensor

from .row_parameter import State


class DirtyRows:
    """The rows of which a copy is out of date; at first all.

    Args:
        rows: number of rows of the table.
    """

    def __init__(self, rows: int) -> None:
        self._number = rows
        self._state: State | None = None
        # What was written since the last `take`: the rows of one step, or, of several steps, a flag for each row.
        self._rows: Tensor | None = None
        self._flags: Tensor | None = None

    def note(self, rows: Tensor | None, before: State, after: State) -> None:
        """Rows (None: all) were written between two states; if the first is not the last known, all may have changed.

        Args:
            rows: int64, ascending, in host memory; not written into afterwards.
        """
        if self._state != before:
            return
        self._state = after
        if rows is not None and self._rows is None and self._flags is None:
            self._rows = rows
            return
        if self._flags is None:
            self._flags = torch.zeros(self._number, dtype=torch.bool, device="cpu")
        for written in (self._rows, slice(None) if rows is None else rows):
            if written is not None:
                self._flags[written] = True
        self._rows = None

    def take(self, state: State) -> Tensor | None:
        """The rows that are dirty, int64 ascending; None: no row. They count as copied then."""
        rows = self._rows
        if self._state != state:  # somebody wrote into the masters: loading, the user
            rows = torch.arange(self._number, device="cpu")
        elif self._flags is not None:
            rows = self._flags.nonzero().flatten()
        self._rows = self._flags = None
        self._state = state
        return rows if rows is not None and len(rows) else None
