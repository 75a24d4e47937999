"""Copies of tables on the device: keys that pass through it, and rows that stay and are updated.

The order of the hand-overs is that of `gather`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from adapter_kernels import scatter_rows

from ..table.layer_rows import LayerRows
from ..table.row_parameter import State
from ..table.row_table import RowTable
from ..tier.residents import Residents
from ..transport.profiling import phase
from ..transport.staging import Slot
from ..transport.streams import DeviceStreams, StreamEvent
from .gather import bring_changed, bring_others


class KeyBuffers:
    """Two buffers on the device through which the keys of all layers pass."""

    def __init__(self, streams: DeviceStreams, layers: Sequence[LayerRows]) -> None:
        self.streams, self._layers = streams, layers
        self._size = max(layer.keys.rows.numel() for layer in layers)
        self._buffers = [self._buffer(layers[0].keys.compute_dtype) for _ in range(2)]
        self._holds: list[tuple[int, State] | None] = [None, None]
        self._absent: list[Residents | None] = [None, None]  # rows that are to be read on the device yet
        self._free = [streams.record_event()] * 2
        self._arrival = list(self._free)

    def prefetch(self, layer: LayerRows) -> None:
        """Queue the copy of a layer's keys, unless they are there."""
        place = layer.number % 2
        with layer.keys.reading() as compute_copy:
            held = (layer.number, layer.keys.state)
            residents = layer.tier.residents if layer.tier is not None else None
            if self._holds[place] == held and self._absent[place] in (None, residents):
                return
            if self._buffers[place].dtype != compute_copy.dtype:  # rows of another dtype were assigned
                with torch.inference_mode(False):  # as in `gather`
                    self._buffers[place] = self._buffer(compute_copy.dtype)
            buffer = self._part(layer)
            self._holds[place] = None  # whatever happens to the copy
            self.streams.inbound.wait_event(self._free[place])
            with phase("bring keys"):
                crossed = self._queue(buffer, compute_copy, residents)
            self._arrival[place] = self.streams.inbound.record_event()
            layer.keys.add_reader_event(self.streams.inbound, self._arrival[place])
            self._holds[place], self._absent[place] = held, residents
        layer.traffic.bytes_to_device += crossed
        layer.traffic.bytes_saved += buffer.nbytes - crossed

    def take(self, layer: LayerRows) -> Tensor:
        """The keys of a layer, [r, d], in the order of the computation."""
        with layer.rows_stay():
            return self._take(layer)

    def _take(self, layer: LayerRows) -> Tensor:
        self.prefetch(layer)
        place = layer.number % 2
        try:
            self.streams.wait_event(self._arrival[place])
            if self._absent[place] is not None and layer.tier is not None:
                layer.tier.fill(layer.keys, self._part(layer))
            self._absent[place] = None
        except BaseException:
            self._holds[place] = None
            raise
        return self._part(layer)

    def _queue(self, buffer: Tensor, compute_copy: Tensor, residents: Residents | None) -> int:
        """Queue the copy of keys that have no place on the device; returns the bytes."""
        inbound = self.streams.inbound
        if residents is None:
            inbound.run(partial(buffer.copy_, compute_copy, non_blocking=True), [buffer])
            return buffer.nbytes
        ids, rows = residents.other_ids, residents.others
        between = inbound.empty((len(rows), buffer.shape[1]), buffer.dtype)
        inbound.wait_event(residents.made)
        inbound.run(partial(bring_others, ids, rows, compute_copy, between, buffer), [buffer, ids])
        return between.nbytes

    def _buffer(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self._size, dtype=dtype, device=self.streams.device)

    def _part(self, layer: LayerRows) -> Tensor:
        """Where the keys of a layer are, [r, d]: layers may have several widths."""
        shape = layer.keys.rows.shape
        return self._buffers[layer.number % 2][: shape.numel()].view(shape)

    def done(self, layer: LayerRows) -> None:
        """The computation has queued its last read of the layer's keys."""
        self._free[layer.number % 2] = self.streams.record_event()


class DeviceCopy:
    """A table's rows on the device; those that change on the host are copied again before they are read."""

    def __init__(self, streams: DeviceStreams, table: RowTable, layer: LayerRows) -> None:
        self.streams, self.table, self.layer, self.traffic = streams, table, layer, layer.traffic
        self._seen: int | None = None  # of the rows that have a place on the device
        table.track_dirty_rows()
        with table.reading() as compute_copy:
            self._rows = torch.empty_like(compute_copy, device=streams.device)
        self._ids = Slot(streams)
        # Some rows, or all (None), on their way: they join the others when these are read next.
        self._coming: tuple[Tensor | None, Tensor, StreamEvent] | None = None

    def prefetch(self) -> None:
        """Queue the copy of what has changed."""
        with self.table.reading() as compute_copy, self._or_all_again():
            if self._rows.dtype != compute_copy.dtype:  # rows of another dtype were assigned
                self._coming = None
                self.table.track_dirty_rows()
                with torch.inference_mode(False):  # as in `gather`
                    self._rows = torch.empty_like(compute_copy, device=self.streams.device)
            changed = self.table.take_dirty_rows()
            if changed is None:
                return
            self._synchronize()
            inbound, device_rows = self.streams.inbound, self._rows
            ids: Tensor | None = None
            if len(changed) == len(compute_copy):
                uses = [device_rows]
                work: Callable[[], object] = partial(device_rows.copy_, compute_copy, non_blocking=True)
                inbound.wait_event(self.streams.record_event())  # the computation may still read them
            else:
                device_rows = inbound.empty((len(changed), compute_copy.shape[1]), compute_copy.dtype)
                ids = inbound.empty(tuple(changed.shape), torch.int32)
                (staged,) = self._ids.take((changed.shape, ids.dtype))
                staged.copy_(changed)
                uses, work = [device_rows, ids], partial(bring_changed, staged, ids, changed, compute_copy, device_rows)
            try:
                with phase("bring changed rows"):
                    inbound.run(work, uses)
            finally:  # also where some of it was queued
                arrival = inbound.record_event()
                self._ids.busy = None if ids is None else arrival
            self.table.add_reader_event(inbound, arrival)
        self._coming = (ids, device_rows, arrival)
        self.traffic.bytes_to_device += device_rows.nbytes + (0 if ids is None else ids.nbytes)

    @contextmanager
    def _or_all_again(self) -> Iterator[None]:
        """If a copy fails, what has changed is not known any more: all rows are copied then."""
        try:
            yield
        except BaseException:
            self._coming = None
            self.table.track_dirty_rows()
            raise

    def current(self) -> Tensor:
        """All rows, [r, d], in the order of the computation."""
        with self.layer.rows_stay(), self._or_all_again():
            self.prefetch()
            self._synchronize()
            tier = self.layer.tier
            if tier is not None and tier.version != self._seen:
                tier.fill(self.table, self._rows)
                self._seen = tier.version
        return self._rows

    def _synchronize(self) -> None:
        if self._coming is None:
            return
        (ids, device_rows, arrival), self._coming, self._seen = self._coming, None, None
        self.streams.wait_event(arrival)
        if ids is not None:
            self.streams.use([ids, device_rows])
            scatter_rows(ids, [device_rows], [self._rows])
