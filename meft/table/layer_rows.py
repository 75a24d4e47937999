"""The tables of an adapter in one layer."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import MEFTConfig
from ..transport.transfer import Traffic
from .row_table import RowTable


@dataclass(eq=False)
class LayerRows:
    """An adapter's part in one layer.

    Attributes:
        number: place of the layer among those of the adapter.
    """

    number: int
    keys: RowTable
    values: RowTable
    config: MEFTConfig
    traffic: Traffic

    @property
    def width(self) -> int:
        """Hidden size d of the layer's FFN."""
        return self.keys.rows.shape[1]

    @property
    def versions(self) -> tuple[int, int]:
        """Of keys and values; they change with every update."""
        return self.keys.version, self.values.version

    def wait_for_updates(self) -> None:
        """Wait for updates that are queued, which counts as a wait of the launching thread."""
        with self.traffic.stalled():
            self.keys.wait_for_update()
            self.values.wait_for_update()

    def count(self, tokens: int, rows: int) -> None:
        """A forward pass of some tokens has used some rows."""
        traffic = self.traffic
        traffic.forwards += 1
        traffic.tokens += tokens
        traffic.union_rows += rows
