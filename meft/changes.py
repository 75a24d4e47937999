"""Which rows of a table have changed since somebody has copied them."""

from __future__ import annotations

import torch
from torch import Tensor

from .kept_rows import State


class Changes:
    """The rows that a copy lacks; at first all.

    Args:
        rows: number of rows of the table.
    """

    def __init__(self, rows: int) -> None:
        self._number = rows
        self._state: State | None = None
        # What was written since they were taken: by one step its rows themselves, by several a mark for each row.
        self._rows: Tensor | None = None
        self._marks: Tensor | None = None

    def note(self, rows: Tensor | None, before: State, after: State) -> None:
        """Rows (None: all) were written between two states; if the first is not the last seen, all may have changed.

        Args:
            rows: int64, ascending, in host memory; nobody writes into it any more.
        """
        if self._state != before:
            return
        self._state = after
        if rows is not None and self._rows is None and self._marks is None:
            self._rows = rows
            return
        if self._marks is None:
            self._marks = torch.zeros(self._number, dtype=torch.bool, device="cpu")
        for written in (self._rows, slice(None) if rows is None else rows):
            if written is not None:
                self._marks[written] = True
        self._rows = None

    def take(self, state: State) -> Tensor | None:
        """The rows that have changed up to now, int64 ascending; None: no row. They count as copied."""
        rows = self._rows
        if self._state != state:  # somebody wrote into the masters: loading, the user
            rows = torch.arange(self._number, device="cpu")
        elif self._marks is not None:
            rows = self._marks.nonzero().flatten()
        self._rows = self._marks = None
        self._state = state
        return rows if rows is not None and len(rows) else None
