"""What the layers of an adapter share that have rows on a device."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from ..transport.staging import Slot
from ..transport.streams import DeviceStreams
from .row_pool import RowPool


class Places(Protocol):
    """What the layers of an adapter share.

    Attributes:
        lock: held while rows change their places, and while they must not. Who has it may wait for the tables' updates
            and locks; who holds the lock of a table must not wait for it.
        streams: of the device.
        pools: one for each of a layer's tables.
        slots, copies: staging memory for small tensors, and for rows that leave. entering: for those that enter, of the
            thread of the updates.
    """

    lock: threading.RLock
    streams: DeviceStreams
    pools: list[RowPool]
    slots: list[Slot]
    copies: list[Slot]
    entering: Slot

    @property
    def tiers(self) -> Sequence[Any]:
        """Of each layer."""

    def give_back(self, homes: Tensor) -> None:
        """Places that are free now."""

    def note(self, tier: Any, rows: Tensor) -> None:
        """Rows were used."""

    @property
    def is_due(self) -> bool:
        """Whether rows may change their places at the next `end_step`."""

    def end_step(self, *, changes: bool = True) -> None:
        """Steps of some of the layers' rows are queued."""

    def shrink(self) -> None:
        """Give memory of the device back: there was none for what rows on it need."""

    def shrink_soon(self) -> None:
        """As `shrink`, at the next `end_step`."""
