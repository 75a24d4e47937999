"""The tasks that own rows of a table, and for each row that a later task has changed its other version.

The first task owns the rows that it has trained. What trains after it changes no owned row; of each other row that it
changes, the version before is kept. So a table can be given back, bit for bit, as it was when a task was frozen: the
rows that were changed since change places with the kept versions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

MOST_TASKS = 254
# The tensors of a table in a file: task of each row, rows with another version, these versions, and names.
PARTS = ("task_owner", "task_rows", "task_values", "task_names")
DAMAGED = "The tasks of the adapter's file are damaged ({what}): restore the file from one save."


def part_of_table(name: str) -> property:
    """One of `PARTS` as an attribute of a table: torch's functions for distributed state dicts look each key up.

    A property, because every access to a parameter of the table would go through a `__getattr__`.
    """

    def part(table: Any) -> Tensor:
        found = {} if table.versions is None else table.versions.tensors()
        if name not in found:
            raise AttributeError(f"{type(table).__name__!r} object has no attribute {name!r}")
        return found[name]

    return property(part)


class RowVersions:
    """Tasks of one table [r, d]; all tensors are in host memory.

    Attributes:
        names: of the tasks, in the order in which they were frozen.
        selected: number of the task whose rows the table has, from 1; None: the newest.
        owner: uint8 [r], number of the task that owns a row; 0: none does.
    """

    def __init__(self, rows: int) -> None:
        self.names: list[str] = []
        self.selected: int | None = None
        self.owner = torch.zeros(rows, dtype=torch.uint8, device="cpu")
        self._kept = torch.zeros(rows, dtype=torch.bool, device="cpu")
        self._rows: list[Tensor] = []
        self._values: list[Tensor] = []

    @property
    def free(self) -> Tensor:
        """bool [r]: no task owns the row."""
        return self.owner == 0

    @property
    def changed(self) -> Tensor:
        """bool [r]: the rows that were changed since the last task was frozen."""
        return self._kept & self.free

    def check_newest(self) -> None:
        """Raises: ValueError: an earlier task is selected."""
        if self.selected is not None:
            raise ValueError(
                f"MEFT's rows are those of the task '{self.names[self.selected - 1]}', which are frozen: call "
                "meft.select_task(model, None) before you train on."
            )

    def keep(self, rows: Tensor, masters: Tensor) -> None:
        """Some rows, int64 [n], are about to be changed: keep those that no version is kept of.

        Raises:
            ValueError: an earlier task is selected.
        """
        self.check_newest()
        rows = rows.to("cpu")
        rows = rows[~self._kept[rows]]
        if len(rows):
            self._kept[rows] = True
            self._rows.append(rows)
            self._values.append(masters.detach().index_select(0, rows.to(masters.device)).to("cpu"))

    def freeze(self, name: str, rows: Tensor) -> None:
        """Give free rows, bool [r], to a new task."""
        self.names.append(name)
        self.owner[rows & self.free] = len(self.names)

    def stored(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """The rows of which another version is kept, int64 [n], and these versions, [n, d], from now on in a dtype."""
        if len(self._rows) > 1:
            self._rows, self._values = [torch.cat(self._rows)], [torch.cat(self._values)]
        if dtype is not None:
            self._values[0] = self._values[0].to(dtype)
        return self._rows[0], self._values[0]

    def exchange(self, selected: int | None) -> tuple[Tensor, Tensor] | None:
        """What changes places when another task is selected: rows, int64 ascending, and their places among `stored`."""
        if not self._rows:
            return None
        rows, _ = self.stored()
        moving = self._older(rows, self.selected) != self._older(rows, selected)
        rows, order = rows[moving].sort()
        return (rows, moving.nonzero().flatten()[order]) if len(rows) else None

    def _older(self, rows: Tensor, selected: int | None) -> Tensor:
        """Whether the table has the older version of some rows while a task is selected."""
        if selected is None:
            return torch.zeros_like(rows, dtype=torch.bool)
        owner = self.owner[rows]
        return (owner == 0) | (owner > selected)

    # ------------------------------------------------------------------ files

    def tensors(self) -> dict[str, Tensor]:
        """All of it, by the names of `PARTS`."""
        about = json.dumps({"names": self.names, "selected": self.selected}).encode()
        found = {"task_owner": self.owner, "task_names": torch.frombuffer(bytearray(about), dtype=torch.uint8)}
        if self._rows:
            found["task_rows"], found["task_values"] = self.stored()
        return found

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], rows: Tensor) -> RowVersions:
        """What `tensors` gave, for a table.

        Raises:
            ValueError: it is not of such a table.
        """
        self, (r, d) = cls(len(rows)), rows.shape
        try:
            about = json.loads(bytes(tensors["task_names"].cpu().tolist()))
            self.names, self.selected = list(about["names"]), about["selected"]
            self.owner.copy_(tensors["task_owner"])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise ValueError(DAMAGED.format(what=error)) from error
        if "task_rows" in tensors:
            kept, values = tensors["task_rows"].cpu().clone(), tensors["task_values"].cpu().to(rows.dtype, copy=True)
            fits = kept.dtype == torch.int64 and values.shape == (len(kept), d) and len(kept.unique()) == len(kept)
            if not fits or (len(kept) and not 0 <= int(kept.min()) <= int(kept.max()) < r):
                raise ValueError(DAMAGED.format(what=f"{len(kept)} rows with versions of {list(values.shape)}"))
            self._kept[kept] = True
            self._rows, self._values = [kept], [values]
        return self
