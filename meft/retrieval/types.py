"""What passes through a layer: which neurons (`Selection`), their rows (`GatheredRows`), and the work in hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from adapter_kernels import SelectedRows, scatter_rows

from ..table.layer_rows import LayerRows
from ..tier.residents import Placement
from ..transport.streams import DeviceStreams, StreamEvent


class Selection(NamedTuple):
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


class PartlyHere(NamedTuple):
    """Rows of a selection of which some were on the device.

    Attributes:
        coming: [c, d], those that come from the host. here: [h, d], the others.
        placement: which are which.
    """

    coming: Tensor
    here: Tensor
    placement: Placement

    def joined(self) -> Tensor:
        """[u, d], once those that come have arrived, in the order of the computation."""
        whole = self.here.new_empty(len(self.placement.selected), *self.here.shape[1:])
        for at, rows in ((self.placement.cold_at, self.coming), (self.placement.hot_at, self.here)):
            scatter_rows(at, [rows], [whole])
        return whole


class GatheredRows(NamedTuple):
    """Rows on their way to where the FFN is computed.

    Attributes:
        keys, values: [u, d], the rows of a selection; or whole tables, [r, d], that are read in place. Tensors once
            `arrived` was called.
        position: int32 [T, K], each pick's place in `keys` and `values`; -1 is none.
        scores: [T, K], the score of each pick, if these are the tables themselves, read in place, which a graph must
            not save: it is not computed again. None: they are gathered rows.
        arrival: the event after which they are there; None: they are, in the order of the computation.
        of_stream: what of them is in a stream's memory.
    """

    keys: Any
    values: Any
    position: Tensor
    arrival: StreamEvent | None = None
    of_stream: tuple[Any, ...] = ()
    scores: Tensor | None = None

    def arrived(self, streams: DeviceStreams) -> GatheredRows:
        """The rows as what the computation queues from now on uses them."""
        if self.arrival is not None:
            streams.wait_event(self.arrival)
            streams.use([rows.coming if isinstance(rows, PartlyHere) else rows for rows in self.of_stream])
        keys, values = (rows.joined() if isinstance(rows, PartlyHere) else rows for rows in (self.keys, self.values))
        return self._replace(keys=keys, values=values)


# Waits until the host knows a selection, and queues the way of its rows.
Gather = Callable[[], tuple[Selection, GatheredRows]]


@dataclass(eq=False)
class PendingForward:
    """A layer's work between `select` and the FFN of its rows.

    Attributes:
        selection: the picks; None until somebody has waited for them, and once a backward pass is through with them.
        rows: their rows; None before they were queued, and once they were used.
        versions: of keys and values as they are read; None without a graph.
        recomputed: whether this is a recomputation of gradient checkpointing.
        on_host: whether a model on the CPU reads the rows where they are; no stream takes part.
        gather: what makes selection and rows, if that was not done yet.
    """

    layer: LayerRows
    selection: Selection | None
    rows: GatheredRows | None
    versions: tuple[int, int] | None
    recomputed: bool
    on_host: bool = False
    gather: Gather | None = None

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
