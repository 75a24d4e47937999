"""The tables of an adapter in one layer."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..config import MEFTConfig
from ..memory.choice import LayerChoice
from ..tier.layer_tier import LayerTier
from ..transport.transfer import Traffic
from .row_table import RowTable


@dataclass(eq=False)
class LayerRows:
    """An adapter's part in one layer.

    Attributes:
        number: place of the layer among those of the adapter.
        tier: the rows that have a place on the device; None: none have.
        choice: which rows a step updates; None: all that it uses.
    """

    number: int
    keys: RowTable
    values: RowTable
    config: MEFTConfig
    traffic: Traffic
    tier: LayerTier | None = None
    choice: LayerChoice | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy or a pickle, whose tables have the newest rows."""
        return {**self.__dict__, "tier": None}

    @property
    def width(self) -> int:
        """Hidden size d of the layer's FFN."""
        return self.keys.rows.shape[1]

    @property
    def versions(self) -> tuple[int, int]:
        """Of keys and values; they change with every update."""
        return self.keys.version, self.values.version

    def rows_stay(self) -> AbstractContextManager[object]:
        """A block in which no other thread takes rows back from a device."""
        return self.tier.owner.lock if self.tier is not None else nullcontext()

    def wait_for_updates(self) -> None:
        """Wait for updates that are queued, which counts as a wait of the launching thread."""
        with self.traffic.stalled():
            self.keys.wait_for_update()
            self.values.wait_for_update()

    def count(self, tokens: int, rows: Tensor) -> None:
        """A forward pass of some tokens has used some rows, int64 [u] where the tables are."""
        if self.tier is not None:
            self.tier.note(rows)
        traffic = self.traffic
        traffic.forwards += 1
        traffic.tokens += tokens
        traffic.union_rows += rows.shape[0]
