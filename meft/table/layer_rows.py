"""The tables of an adapter in one layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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

    def versions_after_updates(self) -> tuple[int, int]:
        """`versions`; the wait for updates that are queued counts as the launching thread's."""
        if self.keys.updates is None:
            return self.versions
        with self.traffic.stalled():
            return self.versions

    @property
    def neurons_per_expert(self) -> int:
        """r / E."""
        return self.config.r // self.config.experts

    def load_on(self, device: torch.device) -> Tensor:
        """The picks of each neuron so far, int64 [r], for whoever picks on a device to add to."""
        return self.traffic.load_on(device, self.config.r)

    def count(self, tokens: int, rows: int) -> None:
        """A forward pass of some tokens has used some rows."""
        traffic = self.traffic
        traffic.forwards += 1
        traffic.tokens += tokens
        traffic.union_rows += rows
