"""The rows of a layer that a step updates, chosen when the backward passes before it are through."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from peft_bridge.torch_private import backward_number

from ..gradient.row_gradient import RowGradient, as_row_gradient
from ..table.row_table import RowTable


def top_rows(uses: Tensor, rarity: Tensor, free: Tensor, most: int) -> Tensor:
    """The rows with the largest uses * rarity, of those that are used and free.

    Args:
        uses: int64 [r]. rarity: float64 [r], at least 0. free: bool [r].
        most: how many at most; of equal ones the lower.

    Returns:
        bool [r].
    """
    rows = (free & (uses > 0)).nonzero().flatten()
    order = (uses[rows] * rarity[rows]).sort(descending=True, stable=True).indices
    chosen = torch.zeros_like(free)
    chosen[rows[order[:most]]] = True
    return chosen


class LayerChoice:
    """Chooses among the rows of one layer.

    Args:
        tables: keys and values.
        most: rows that a step updates, at most; None: all that no task owns.
        rarity: float64 [r] in host memory, asked for when it is first needed.

    Attributes:
        counts: whether it goes by how often rows are used.
    """

    def __init__(self, tables: Sequence[RowTable], most: int | None, rarity: Callable[[], Tensor]) -> None:
        self.tables, self._most, self._rarity, self.counts = tuple(tables), most, rarity, most is not None
        self._uses: dict[torch.device, Tensor] = {}
        self._all_uses: Tensor | None = None  # of all ranks, where they have agreed
        self._top: Tensor | None = None
        # Until the step: gradients of which some rows were not chosen, and which.
        self._whole: list[tuple[RowTable, RowGradient, Tensor]] = []
        self._backward, self._stepped = -1, False

    @property
    def size(self) -> int:
        """Rows of the layer, r."""
        return len(self.tables[0].rows)

    @property
    def active(self) -> bool:
        """Whether there are rows that a step must not update."""
        keys, values = self.tables
        return self.counts or keys.versions is not None or values.versions is not None

    def prepare(self) -> None:
        """A pass begins after which rows may be updated.

        Raises: ValueError: the counts of the background cannot be used.
        """
        if self.counts and any(table.rows.requires_grad for table in self.tables):
            self._rarity()

    # ------------------------------------------------------------------ uses

    def note(self, rows: Tensor, position: Tensor) -> None:
        """A backward pass goes through the layer.

        Args:
            rows: int32 [u]. position: int32 [T, K], place of each pick in `rows`; -1 is none.
        """
        number = backward_number()
        # Passes whose gradients were used, or thrown away, count no more.
        if number != self._backward and (self._stepped or not any(map(_has_gradient, self.tables))):
            self._uses, self._whole = {}, []
            self._stepped = False
        self._backward, self._all_uses, self._top = number, None, None
        if not self.counts or not len(rows):
            return
        uses = self._uses.get(rows.device)
        if uses is None:
            with torch.inference_mode(False):
                uses = torch.zeros(self.size, dtype=torch.int64, device=rows.device)
            self._uses[rows.device] = uses
        picks = position.flatten()
        uses.index_add_(0, rows.index_select(0, picks.clamp(min=0)), (picks >= 0).to(torch.int64))

    def uses(self) -> Tensor:
        """Picks of each row since the last step, of this rank; int64 [r] in host memory."""
        found = [uses.to("cpu") for uses in self._uses.values()]
        return torch.stack(found).sum(0) if found else torch.zeros(self.size, dtype=torch.int64)

    def agree(self, uses: Tensor) -> None:
        """Take the uses of all ranks in place of those of this one."""
        self._all_uses, self._top = uses, None

    # ------------------------------------------------------------------ gradients

    def chosen_rows(self) -> Tensor:
        """bool [r] in host memory."""
        free = torch.ones(self.size, dtype=torch.bool, device="cpu")
        for table in self.tables:
            if table.versions is not None:
                free &= table.versions.free
        if self._most is None:
            return free
        if self._top is None:
            uses = self.uses() if self._all_uses is None else self._all_uses
            self._top = top_rows(uses, self._rarity(), free, self._most)
        return self._top & free  # a task may have been frozen since

    def chosen(self, gradient: RowGradient, kept: Tensor | None = None) -> RowGradient:
        """The gradient of the chosen rows; once it is there."""
        which = _flags(self.chosen_rows() if kept is None else kept, gradient)
        return gradient if bool(which.all()) else gradient.some(which)

    def join(self) -> None:
        """Add to the gradients what `divide` has left out of them."""
        divided, self._whole = self._whole, []
        for table, gradient, left in divided:
            if _has_gradient(table):
                chosen = as_row_gradient(table.rows.grad, table.rows)  # type: ignore[arg-type]
                table.rows.grad = chosen.add_(gradient.some(left))

    def divide(self) -> None:
        """Leave the rows that are not chosen out of the gradients, so that nobody sees them before the step."""
        for table in self.tables:
            given = table.rows.grad
            if given is None or given.requires_grad or getattr(given, "consumed", False):
                continue
            gradient = as_row_gradient(given, table.rows)
            which = _flags(self.chosen_rows(), gradient)
            if bool(which.all()):
                continue
            if self.counts:  # after a further backward pass others may be chosen
                self._whole.append((table, gradient, ~which))
            table.rows.grad = gradient.some(which)

    def stepped(self) -> None:
        """The gradients were used."""
        self._stepped, self._whole = True, []


def _has_gradient(table: RowTable) -> bool:
    gradient = table.rows.grad
    if isinstance(gradient, RowGradient):
        return not (gradient.consumed or gradient.has_no_rows)
    return gradient is not None


def _flags(kept: Tensor, gradient: RowGradient) -> Tensor:
    rows = gradient.to_multiply()[0]
    return kept.to(rows.device).index_select(0, rows)
