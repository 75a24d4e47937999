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
        self._changed = torch.ones(rows, dtype=torch.bool, device="cpu")
        self._state: State | None = None

    def note(self, rows: Tensor | None, before: State, after: State) -> None:
        """Rows (None: all) were written between two states; if the first is not the last seen, all may have changed."""
        if self._state == before:
            self._changed[slice(None) if rows is None else rows] = True
            self._state = after

    def take(self, state: State) -> Tensor:
        """The rows that have changed up to now, int64 ascending; they count as copied."""
        if self._state != state:  # somebody wrote into the masters: loading, the user
            self._changed.fill_(True)
        rows = self._changed.nonzero().flatten()
        self._changed.zero_()
        self._state = state
        return rows
