"""What passes between the parts of a retrieval: picks, their rows, and the work that was begun for a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..table.layer_rows import LayerRows
from ..transport.streams import DeviceStreams, StreamEvent


@dataclass(frozen=True)
class Picks:
    """The neurons that T tokens use.

    Attributes:
        rows: int32 [u], the union: distinct neurons, ascending, on the device.
        position: int32 [T, K], place of each pick in `rows`; -1 is none.
        host_rows: int64 [u], the union where the tables are.
        arrival: the event after which `rows` and `position`, in one piece of a stream's memory, are there; None: they
            are.
    """

    rows: Tensor
    position: Tensor
    host_rows: Tensor
    arrival: StreamEvent | None = None

    def join(self, streams: DeviceStreams) -> None:
        """What the computation queues from now on uses the picks."""
        if self.arrival is not None:
            streams.wait_event(self.arrival)
            streams.use([self.position])


@dataclass(frozen=True)
class Picking:
    """Picks that are being made, for which nobody has waited yet.

    Attributes:
        wait: waits until the host knows them.
        made: the point of the computation from which on a stream finds on the device what the picks are made of; None:
            no stream will ask.
    """

    wait: Callable[[], Picks]
    made: StreamEvent | None


@dataclass(frozen=True)
class GatheredRows:
    """Rows of a union on their way to the device.

    Attributes:
        keys, values: [u, d] in the dtype in which rows are read.
        arrival: the event after which they are there; None: they are, in the order of the computation.
        of_stream: what of them is in a stream's memory.
    """

    keys: Tensor
    values: Tensor
    arrival: StreamEvent | None
    of_stream: tuple[Tensor, ...] = ()

    def join(self, streams: DeviceStreams) -> None:
        """What the computation queues from now on uses the rows."""
        if self.arrival is not None:
            streams.wait_event(self.arrival)
            streams.use(self.of_stream)


@dataclass(eq=False)
class PendingForward:
    """A layer's work that was queued beside the base FFN.

    Attributes:
        picks: the picks; None until somebody has waited for them.
        fetched: the rows; None before their way was queued, and once they were used.
        versions: of keys and values as they are read.
        again: whether this is a recomputation.
        complete: waits for the picks and queues the way of their rows, if that was not done yet.
    """

    layer: LayerRows
    picks: Picks | None
    fetched: GatheredRows | None
    versions: tuple[int, int]
    again: bool
    complete: Callable[[], tuple[Picks, GatheredRows]] | None = None
