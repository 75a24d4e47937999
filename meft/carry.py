"""What the strategies carry: picks, their rows, and copies of tables on the device.

The order of a hand-over. Host to device: the launching thread takes a table's lock, which waits for its update, queues
the copy and leaves its mark with the table (`RowTable.read_until`); an update waits for the marks before it writes.
A copy into memory that was computed with waits for the mark of that computation; the computation joins the copy's mark.
In a forward pass rows come beside the base FFN, which is queued before anybody knows how many there are: memory that it
has given back may be in use until it is through, so they go into memory of the lane (`Lane.empty`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.profiler import record_function

from adapter_kernels import gather_rows, row_union_window, scatter_rows

from .config import MEFTConfig
from .kept_rows import State
from .lanes import Lanes, Mark
from .selection import best_neurons
from .staging import Slot
from .store import RowTable
from .transfer import Traffic, bring_rows, nbytes


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
    def versions(self) -> tuple[int, int]:
        """Of keys and values; they change with every update."""
        return self.keys.version, self.values.version


@dataclass(frozen=True)
class Picks:
    """The neurons that T tokens use.

    Attributes:
        rows: int32 [u], the union: distinct neurons, ascending, on the device.
        position: int32 [T, K], place of each pick in `rows`; -1 is none.
        host_rows: int64 [u], the union where the tables are.
        arrival: the mark after which `rows` and `position`, in one piece of a lane's memory, are there; None: they are.
    """

    rows: Tensor
    position: Tensor
    host_rows: Tensor
    arrival: Mark | None = None

    def join(self, lanes: Lanes) -> None:
        """What the computation queues from now on uses the picks."""
        if self.arrival is not None:
            lanes.join(self.arrival)
            lanes.use([self.position])


@dataclass(frozen=True)
class Picking:
    """Picks that are being made, for which nobody has waited yet.

    Attributes:
        wait: waits until the host knows them.
        made: the point of the computation from which on a lane finds on the device what the picks are made of; None:
            no lane will ask.
    """

    wait: Callable[[], Picks]
    made: Mark | None


@dataclass(frozen=True)
class Fetched:
    """Rows of a union on their way to the device.

    Attributes:
        keys, values: [u, d] in the dtype in which rows are read.
        arrival: the mark after which they are there; None: they are, in the order of the computation.
        of_lane: what of them is in a lane's memory.
    """

    keys: Tensor
    values: Tensor
    arrival: Mark | None
    of_lane: tuple[Tensor, ...] = ()

    def join(self, lanes: Lanes) -> None:
        """What the computation queues from now on uses the rows."""
        if self.arrival is not None:
            lanes.join(self.arrival)
            lanes.use(self.of_lane)


def picked_neurons(x: Tensor, logits: Tensor, keys: Tensor, config: MEFTConfig) -> Tensor:
    """Ids of the neurons of each token, int32 [T, K], -1 where there are fewer; computed where the keys are.

    Args:
        x: [T, d]. logits: W_g x, [T, E]. keys: [r, d].
    """
    return best_neurons(x, logits, keys, config.probed, config.top_k, config.router_factor, by_neuron=False)[0]


def union_of(ids: Tensor, layer: LayerRows) -> tuple[Tensor, Tensor, Tensor]:
    """The union of some picks, where they are; without a wait. The experts' load is counted.

    Returns:
        rows, int32 [as many as there can be], of which the first `count` are the union; count, int32 [1]; the places of
        the picks in it, int32 [T, K].
    """
    r, load = layer.config.r, layer.traffic.load_on(ids.device, layer.config.experts)
    rows, count, _, position = row_union_window(ids, r, max(1, min(r, ids.numel())), load=load)
    return rows, count, position


def experts_of(picks: Picks, each: int) -> Tensor:
    """The expert of each pick, int64 [T, K]; any where there is no pick.

    Args:
        each: neurons of an expert.
    """
    if not len(picks.rows):
        return picks.position.new_zeros(picks.position.shape, dtype=torch.int64)
    experts = torch.empty(picks.rows.shape, dtype=torch.int64, device=picks.rows.device)
    torch.div(picks.rows, each, rounding_mode="floor", out=experts)
    return experts[picks.position]  # -1 is the last one


def rows_of(rows: Tensor, tables: Sequence[Tensor]) -> list[Tensor]:
    """Rows of two tables that are on the device."""
    if tables[0].dtype == tables[1].dtype:
        return gather_rows(rows, tables)
    return [table.index_select(0, rows) for table in tables]


def gather(
    lanes: Lanes, layer: LayerRows, tables: Sequence[RowTable], picks: Picks, made: Mark | None = None
) -> tuple[list[Tensor], Mark]:
    """Queue the way of a union's rows out of host memory.

    Args:
        made: the point of the computation where the picks' ids are on the device: rows go into memory of the lane and
            wait for no more. None: for all that the computation has queued, as memory that it gave back may be theirs.

    Returns:
        of each table [u, d] in the dtype in which it is read, and the mark after which they are there.
    """
    with ExitStack() as held:
        wires = [held.enter_context(table.reading(picks.host_rows)) for table in tables]
        forms = [((len(picks.rows), wire.shape[1]), wire.dtype) for wire in wires]
        with torch.inference_mode(False):  # a lane, which may be a thread, writes into them
            if made is None:
                out = [torch.empty(shape, dtype=dtype, device=lanes.device) for shape, dtype in forms]
            else:
                out = [lanes.inbound.empty(*form) for form in forms]
        lanes.inbound.after(lanes.here() if made is None else made)
        lanes.inbound.run(partial(bring_rows, picks.rows, picks.host_rows, wires, out), [picks.rows, *out])
        arrival = lanes.inbound.mark()
        for table in tables:
            table.read_until(lanes.inbound, arrival)
    layer.traffic.bytes_to_device += sum(map(nbytes, out))
    return out, arrival


class KeyBuffers:
    """Two buffers on the device through which the keys of all layers pass."""

    def __init__(self, lanes: Lanes, layers: Sequence[LayerRows]) -> None:
        self.lanes, self._layers = lanes, layers
        with layers[0].keys.reading() as wire:
            self._buffers = [torch.empty_like(wire, device=lanes.device) for _ in range(2)]
        self._holds: list[tuple[int, State] | None] = [None, None]
        self._free = [lanes.here()] * 2
        self._arrival = list(self._free)

    def prefetch(self, layer: LayerRows) -> None:
        """Queue the copy of a layer's keys, unless they are there."""
        place = layer.number % 2
        with layer.keys.reading() as wire:
            held = (layer.number, layer.keys.state)
            if self._holds[place] == held:
                return
            buffer = self._buffers[place]
            if buffer.dtype != wire.dtype:  # rows of another dtype were assigned
                with torch.inference_mode(False):  # as in `gather`
                    buffer = self._buffers[place] = torch.empty_like(wire, device=self.lanes.device)
            self._holds[place] = None  # whatever happens to the copy
            self.lanes.inbound.after(self._free[place])
            with record_function("meft: bring keys"):
                self.lanes.inbound.run(partial(buffer.copy_, wire, non_blocking=True), [buffer])
            self._arrival[place] = self.lanes.inbound.mark()
            layer.keys.read_until(self.lanes.inbound, self._arrival[place])
            self._holds[place] = held
        layer.traffic.bytes_to_device += nbytes(buffer)

    def take(self, layer: LayerRows) -> Tensor:
        """The keys of a layer, [r, d], in the order of the computation."""
        self.prefetch(layer)
        place = layer.number % 2
        try:
            self.lanes.join(self._arrival[place])
        except BaseException:
            self._holds[place] = None
            raise
        return self._buffers[place]

    def done(self, layer: LayerRows) -> None:
        """The computation has queued its last read of the layer's keys."""
        self._free[layer.number % 2] = self.lanes.here()


class DeviceCopy:
    """A table's rows on the device; those that change on the host are copied again before they are read."""

    def __init__(self, lanes: Lanes, table: RowTable, traffic: Traffic) -> None:
        self.lanes, self.table, self.traffic = lanes, table, traffic
        table.follow_changes()
        with table.reading() as wire:
            self._rows = torch.empty_like(wire, device=lanes.device)
        self._ids = Slot(lanes)
        # Some rows, or all (None), on their way: they join the others when these are read next.
        self._coming: tuple[Tensor | None, Tensor, Mark] | None = None

    def prefetch(self, rows: Tensor | None = None) -> None:
        """Queue the copy of what has changed.

        Args:
            rows: the rows that will be read, None for all.
        """
        with self.table.reading(rows) as wire, self._or_all_again():
            if self._rows.dtype != wire.dtype:  # rows of another dtype were assigned
                self._coming = None
                self.table.follow_changes()
                with torch.inference_mode(False):  # as in `gather`
                    self._rows = torch.empty_like(wire, device=self.lanes.device)
            changed = self.table.take_changes()
            if changed is None:
                return
            self._settle()
            everything = len(changed) == len(wire)
            near = self._rows
            uses = [near]
            work: Callable[[], object] = partial(near.copy_, wire, non_blocking=True)
            if not everything:
                with torch.inference_mode(False):  # as in `gather`
                    near = torch.empty(len(changed), wire.shape[1], dtype=wire.dtype, device=self.lanes.device)
                    ids = torch.empty(changed.shape, dtype=torch.int32, device=self.lanes.device)
                (here,) = self._ids.take((changed.shape, ids.dtype))
                here.copy_(changed)
                uses, work = [near, ids], partial(_bring_changed, here, ids, changed, wire, near)
            self.lanes.inbound.after(self.lanes.here())
            try:
                with record_function("meft: bring changed rows"):
                    self.lanes.inbound.run(work, uses)
            finally:  # also where some of it was queued
                arrival = self.lanes.inbound.mark()
                self._ids.busy = None if everything else arrival
            self.table.read_until(self.lanes.inbound, arrival)
        self._coming = (None if everything else ids, near, arrival)
        self.traffic.bytes_to_device += nbytes(near) + (0 if everything else nbytes(ids))

    @contextmanager
    def _or_all_again(self) -> Iterator[None]:
        """If a copy fails, what has changed is not known any more: all rows are copied then."""
        try:
            yield
        except BaseException:
            self._coming = None
            self.table.follow_changes()
            raise

    def current(self, rows: Tensor | None = None) -> Tensor:
        """All rows, [r, d], in the order of the computation; of `rows` (None: all) those of now."""
        self.prefetch(rows)
        with self._or_all_again():
            self._settle()
        return self._rows

    def _settle(self) -> None:
        if self._coming is None:
            return
        (ids, near, arrival), self._coming = self._coming, None
        self.lanes.join(arrival)
        if ids is not None:
            scatter_rows(ids, [near], [self._rows])


def _bring_changed(here: Tensor, ids: Tensor, changed: Tensor, wire: Tensor, near: Tensor) -> None:
    ids.copy_(here, non_blocking=True)
    bring_rows(ids, changed, [wire], [near])
