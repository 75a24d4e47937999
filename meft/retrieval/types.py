"""What passes through a layer: which neurons (`Selection`), their rows (`GatheredRows`), and the work in hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from adapter_kernels import SelectedRows

from ..table.layer_rows import LayerRows
from ..transport.streams import DeviceStreams, StreamEvent


@dataclass(frozen=True)
class Selection:
    """The neurons that T tokens use.

    Attributes:
        rows: int32 [u], the distinct neurons, ascending, on the device.
        position: int32 [T, K], place of each pick in `rows`; -1 is none.
        host_rows: int64 [u], `rows` where the tables are.
        arrival: the event after which `rows` and `position`, in one piece of a stream's memory, are there; None: they
            are.
        picks: as they were made, where rows may be read in place; None elsewhere.
    """

    rows: Tensor
    position: Tensor
    host_rows: Tensor
    arrival: StreamEvent | None = None
    picks: SelectedRows | None = None

    def wait_in(self, streams: DeviceStreams) -> None:
        """What the computation queues from now on uses the selection."""
        if self.arrival is not None:
            streams.wait_event(self.arrival)
            streams.use([self.position])


@dataclass(frozen=True)
class PendingSelection:
    """A selection that is being made, for which nobody has waited yet.

    Attributes:
        wait: waits until the host knows it.
        made: the point of the computation from which on a stream finds on the device what the selection is made of;
            None: no stream will ask.
    """

    wait: Callable[[], Selection]
    made: StreamEvent | None


@dataclass(frozen=True)
class GatheredRows:
    """Rows on their way to where the FFN is computed.

    Attributes:
        keys, values: [u, d], the rows of a selection; or whole tables, [r, d], that are read in place.
        position: int32 [T, K], each pick's place in `keys` and `values`; -1 is none.
        scores: [T, K], the score of each pick, if the tables are read in place: it is not computed again.
        arrival: the event after which they are there; None: they are, in the order of the computation.
        of_stream: what of them is in a stream's memory.
    """

    keys: Tensor
    values: Tensor
    position: Tensor
    arrival: StreamEvent | None = None
    of_stream: tuple[Tensor, ...] = ()
    scores: Tensor | None = None

    @property
    def in_place(self) -> bool:
        """Whether they are the tables themselves, which a graph must not save."""
        return self.scores is not None

    def wait_in(self, streams: DeviceStreams) -> None:
        """What the computation queues from now on uses the rows."""
        if self.arrival is not None:
            streams.wait_event(self.arrival)
            streams.use(self.of_stream)


@dataclass(eq=False)
class PendingForward:
    """A layer's work between `select` and the FFN of its rows.

    Attributes:
        selection: the picks; None until somebody has waited for them, and once a backward pass is through with them.
        rows: their rows; None before they were queued, and once they were used.
        versions: of keys and values as they are read; None without a graph.
        recomputed: whether this is a recomputation of gradient checkpointing.
        on_host: whether a model on the CPU reads the rows where they are; no stream takes part.
        gather: waits for the picks and queues their rows, if that was not done yet.
    """

    layer: LayerRows
    selection: Selection | None
    rows: GatheredRows | None
    versions: tuple[int, int] | None
    recomputed: bool
    on_host: bool = False
    gather: Callable[[], tuple[Selection, GatheredRows]] | None = None

    @property
    def known(self) -> Selection:
        """The selection, for which somebody has waited."""
        assert self.selection is not None
        return self.selection


def check_versions(seen: tuple[int, int] | None, now: tuple[int, int]) -> None:
    """Raises: RuntimeError: keys or values were updated since a forward pass read them."""
    if seen != now:
        raise RuntimeError(
            "MEFT rows were updated between this forward pass and its backward pass: call backward() before step()."
        )
