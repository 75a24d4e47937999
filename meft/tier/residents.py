"""What is known of the rows of a layer that have a place on the device, and of those of a selection among them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..transport.staging import Coming, Slot, sent
from ..transport.streams import DeviceStreams, StreamEvent


@dataclass(eq=False)
class Residents:
    """Rows that have a place, as long as they are the same.

    Attributes:
        rows: int64 [H] in host memory, ascending.
        homes: int64 [H] in host memory, the place of each in the pools.
        ids, places: `rows`, int32, and `homes`, int64, on the device.
        number: int64 [r] in host memory, the number of a row in `rows`; -1: it has no place.
        others, other_ids: the rows that have none, int64 in host memory, ascending; the same, int32, on the device.
        made: the event of the computation after which what is on the device is there.
    """

    rows: Tensor
    homes: Tensor
    ids: Tensor
    places: Tensor
    number: Tensor
    others: Tensor
    other_ids: Tensor
    made: StreamEvent

    @classmethod
    def of(cls, rows: Tensor, homes: Tensor, r: int, streams: DeviceStreams, slots: list[Slot]) -> Residents:
        """In the order of the computation from now on."""
        number = torch.full((r,), -1, dtype=torch.int64, device="cpu")
        number[rows] = torch.arange(len(rows), device="cpu")
        others = (number < 0).nonzero().flatten()
        packed = torch.cat([homes, rows, others])
        device, arrival = sent(streams, packed, slots)
        streams.wait_event(arrival)
        streams.use([device])
        places, ids, other_ids = device.split([len(rows), len(rows), len(others)])
        on_device = ids.to(torch.int32), places.clone()
        return cls(rows, homes, *on_device, number, others, other_ids.to(torch.int32), streams.record_event())


class Placement(NamedTuple):
    """Where the rows of a selection are.

    Attributes:
        selected: the selection's rows, int64 [u] in host memory.
        cold_rows: those that are on the host. cold_at, cold_ids: int32 on the device, their places in the selection,
            and the same rows.
        touched: int64 [h] in host memory, numbers of the others in `residents.rows`. numbers, hot_at: the same, and
            their places in the selection, int32 on the device.
        memory: of all that is on the device. arrival: the event after which it is there.
    """

    selected: Tensor
    residents: Residents
    cold_rows: Tensor
    touched: Tensor
    cold_at: Tensor
    cold_ids: Tensor
    hot_at: Tensor
    numbers: Tensor
    memory: Tensor
    arrival: StreamEvent


@dataclass(eq=False)
class Entering:
    """Rows on their way to the device.

    Attributes:
        buffers: of each table, of each tensor that `without_copy` names, in memory of the inbound stream.
        arrivals: of each table, the event after which they are there; fewer: the job that reads them was not done.
    """

    rows: Tensor
    homes: Tensor
    buffers: list[list[Tensor]]
    arrivals: list[StreamEvent] = field(default_factory=list)

    @property
    def is_on_its_way(self) -> bool:
        """Whether all of it was queued."""
        return len(self.arrivals) == len(self.buffers)


@dataclass(eq=False)
class Leaving:
    """Rows on their way back to the host, which has the newest values once they are home.

    Attributes:
        rows: int64 [n] in host memory, ascending.
        copies: of each table, of each tensor that `without_copy` names, on the device: they are kept until they are
            home, so that a copy that fails can be made again.
        coming: the copies to the host; None: they have failed.
    """

    rows: Tensor
    copies: list[Tensor]
    coming: Coming | None
