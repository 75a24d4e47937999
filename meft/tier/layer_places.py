"""Which rows of a layer have a place on the device: how they come, leave, and are taken back."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from ..table.moments import RowMoments
from ..table.row_table import RowTable, without_copy
from ..table.shared_rows import SWAPPED
from ..transport.staging import Coming, copy_all, sent
from ..transport.streams import StreamEvent
from ..transport.transfer import Traffic
from .places import Places
from .residents import Entering, Leaving, Placement, Residents
from .row_pool import Form, brought_home, form_of

WRITTEN = (
    "MEFT's {what} were written by compiled code while the newest of their rows were on the device (device_rows), and "
    "what was written is lost: call synchronize() of the tables before such code runs, or load a checkpoint."
)


class LayerPlaces:
    """The rows of a layer that have a place.

    Attributes:
        tables: keys and values, or values alone.
        residents: None: no row has a place.
        entries: of each table, the moments that its last step had.
        version: changes with all that is written into its places.
        written: the event after the last of it; None: nothing was.
    """

    def __init__(self, owner: Places, tables: Sequence[RowTable], traffic: Traffic) -> None:
        self.owner, self.tables, self.traffic = owner, tuple(tables), traffic
        self.residents: Residents | None = None
        self.entries: list[RowMoments | None] = [None] * len(self.tables)
        self.version = 0
        self.written: StreamEvent | None = None
        self._entering: Entering | None = None
        self._leaving: Leaving | None = None
        self._placement: Placement | None = None
        self._addresses = [0] * len(self.tables)
        self._versions = [0] * len(self.tables)  # of the tables, as far as their updates go

    @property
    def holds_rows(self) -> bool:
        return self._entering is not None or self.residents is not None or self._leaving is not None

    @property
    def owes_rows(self) -> bool:
        leaving = self._leaving
        return leaving is not None and leaving.coming is None

    @property
    def is_changing(self) -> bool:
        """Whether rows are on their way to the device."""
        return self._entering is not None

    def forms(self) -> list[Form]:
        """What a place for a key, and for a value, consists of."""
        return [form_of(t, entry) for t, entry in zip(self.tables, self.entries, strict=True) if entry is not None]

    def which(self, table: RowTable) -> int:
        """The number of a table among `tables`."""
        return 0 if table is self.tables[0] else 1

    def wait_for_writes(self) -> None:
        """What the calling thread queues from now on reads or writes places: another one may have written last."""
        if self.written is not None:
            self.owner.streams.wait_event(self.written)

    def note_write(self) -> None:
        """Places were written, in the order of the computation."""
        self.written = self.owner.streams.record_event()
        self.version += 1

    # ------------------------------------------------------------------ coming and going

    def leave(self, rows: Tensor) -> None:
        """Begin to take some rows back to the host; call `queue_changes` afterwards. What fails changes nothing."""
        for table in self.tables:
            table.wait_for_update()
        residents = self.residents
        if residents is None:  # others that had not come home were waited for, with all rows
            return
        numbers, streams, slots = residents.number[rows], self.owner.streams, self.owner.slots
        homes = residents.homes[numbers]
        kept = torch.ones(len(residents.rows), dtype=torch.bool, device="cpu")
        kept[numbers] = False
        others = self._residents(residents.rows[kept], residents.homes[kept])
        places, arrival = sent(streams, homes, slots)
        streams.wait_event(arrival)
        streams.use([places])
        self.wait_for_writes()
        copies = [copy for pool in self.owner.pools for copy in pool.rows(places)]
        self._leaving = Leaving(rows, copies, Coming(streams, copies, self.owner.copies))
        self._have(others)
        self.owner.give_back(homes)
        self.traffic.bytes_to_host += sum(copy.nbytes for copy in copies)

    def enter(self, rows: Tensor, homes: Tensor) -> None:
        """Begin to bring some rows to places that are theirs; call `queue_changes` afterwards."""
        empty = self.owner.streams.inbound.empty
        buffers = [
            [empty((len(rows), *tensor.shape[1:]), tensor.dtype) for tensor in without_copy(pool.state)]
            for pool in self.owner.pools
        ]
        self._entering = Entering(rows, homes, buffers)
        self._addresses = [table.masters.data_ptr() for table in self.tables]
        if self.residents is None:
            self._versions = [table.version for table in self.tables]
        self.traffic.rows_entered += len(rows)
        self.traffic.bytes_to_device += sum(buffer.nbytes for each in buffers for buffer in each)

    def queue_changes(self) -> None:
        """Let the thread of the updates write home what leaves, and read what enters, behind the tables' updates."""
        entering = self._entering if self._entering is not None and not self._entering.arrivals else None
        leaving = self._leaving
        queue = self.tables[0].updates
        if queue is None and leaving is not None:
            self._write_home(leaving, self.entries)
        if queue is None or (leaving is None and entering is None):
            return
        entries = list(self.entries)
        pending = queue.add(partial(self._change, leaving, entering, entries), self.tables[0].name)
        for table in self.tables:
            table.wait_for_too(pending)

    def _change(self, leaving: Leaving | None, entering: Entering | None, entries: list[RowMoments | None]) -> None:
        if leaving is not None:
            self._write_home(leaving, entries)
        if entering is None:
            return
        streams, staging = self.owner.streams, self.owner.entering
        for table, buffers, entry in zip(self.tables, entering.buffers, entries, strict=True):
            assert entry is not None
            staged = staging.take(*((buffer.shape, buffer.dtype) for buffer in buffers))
            with table.lock, torch.no_grad():
                for source, target in zip(without_copy(table.state_of(entry)), staged, strict=True):
                    torch.index_select(source, 0, entering.rows, out=target)
            try:
                streams.inbound.run(partial(copy_all, buffers, staged), buffers)
            finally:
                staging.busy = streams.inbound.record_event()
            entering.arrivals.append(staging.busy)

    def note_update(self, table: RowTable, before: int, after: int) -> None:
        if self._versions[self.which(table)] == before:
            self._versions[self.which(table)] = after

    def _write_home(self, leaving: Leaving, entries: list[RowMoments | None]) -> None:
        """If it fails, they are owed: whoever waits for the tables next tries again."""
        try:
            if leaving.coming is None:
                leaving.coming = Coming(self.owner.streams, leaving.copies, self.owner.copies)
            copies = leaving.coming.wait()
            each = len(copies) // len(self.tables)
            for i, (table, entry) in enumerate(zip(self.tables, entries, strict=True)):
                assert entry is not None
                table.take_back(leaving.rows, copies[i * each : (i + 1) * each], entry)
        except BaseException:
            leaving.coming = None
            raise
        self._leaving = None

    def land(self) -> None:
        """Give rows that have come their places, in the order of the computation, after all queued updates.

        If that fails they stay where they were, on the host.
        """
        if self._entering is None:
            return
        with self.owner.lock:
            entering, has_places = self._entering, False
            if entering is None:
                return
            try:
                if entering.is_on_its_way:  # else their job has failed
                    self._give_places(entering)
                    has_places = True
            except torch.OutOfMemoryError:
                self.owner.shrink_soon()
            finally:
                self._entering = None
                if not has_places:
                    self.owner.give_back(entering.homes)

    def _give_places(self, entering: Entering) -> None:
        streams = self.owner.streams
        for arrival in entering.arrivals:
            streams.wait_event(arrival)
        streams.use([buffer for each in entering.buffers for buffer in each])
        rows, homes = entering.rows, entering.homes
        places, arrival = sent(streams, homes, self.owner.slots)
        streams.wait_event(arrival)
        streams.use([places])
        self.wait_for_writes()
        for pool, buffers in zip(self.owner.pools, entering.buffers, strict=True):
            pool.put(places, buffers)
        if self.residents is not None:
            rows, order = torch.cat([self.residents.rows, rows]).sort()
            homes = torch.cat([self.residents.homes, homes])[order]
        self._have(self._residents(rows, homes))
        self.note_write()

    def _residents(self, rows: Tensor, homes: Tensor) -> Residents | None:
        r, owner = len(self.tables[0].rows), self.owner
        return Residents.of(rows, homes, r, owner.streams, owner.slots) if len(rows) else None

    def _have(self, residents: Residents | None) -> None:
        self.residents, self._placement = residents, None
        self.version += 1

    # ------------------------------------------------------------------ back to the host

    def settle(self) -> None:
        """As `RowsOnDevice.settle`, of all tables. What fails leaves the rows where they are.

        Raises:
            RuntimeError: the rows were put elsewhere, so that there is no table to write to.
        """
        holds_table = any(table.lock._is_owned() for table in self.tables)  # type: ignore[attr-defined]
        if not self.owner.lock.acquire(blocking=not holds_table):
            raise RuntimeError(SWAPPED)
        try:
            if self.holds_rows:
                self._settle()
        finally:
            self.owner.lock.release()

    def _settle(self) -> None:
        for table in self.tables:
            table.wait_for_queue()
        with ExitStack() as held:
            for table in self.tables:
                held.enter_context(table.lock)
            held.enter_context(torch.no_grad())
            held.enter_context(torch.inference_mode(False))
            # Looking at rows that were replaced may settle them, in the memory that they had.
            moved = [table.masters.data_ptr() for table in self.tables] != self._addresses
            residents, entering, leaving = self.residents, self._entering, self._leaving
            if leaving is not None and not moved:  # nobody has queued it, or it has failed
                self._write_home(leaving, self.entries)
            written = [
                t.name for t, known in zip(self.tables, self._versions, strict=True) if t.masters._version != known
            ]
            if residents is not None:
                if not moved:
                    self._take_all_back(residents)
                self.owner.give_back(residents.homes)
            if entering is not None:
                self.owner.give_back(entering.homes)
            self.residents = self._entering = self._leaving = self._placement = None
            self.version += 1
        if moved and (residents is not None or leaving is not None):
            raise RuntimeError(SWAPPED)
        if written and residents is not None:
            raise RuntimeError(WRITTEN.format(what=" and ".join(written)))

    def _take_all_back(self, residents: Residents) -> None:
        self.wait_for_writes()
        for table, pool, entry in zip(self.tables, self.owner.pools, self.entries, strict=True):
            assert entry is not None
            for block, copies in brought_home(pool, residents.places, self.owner.streams, self.owner.copies):
                self.traffic.bytes_to_host += sum(copy.nbytes for copy in copies)
                table.take_back(residents.rows[block], copies, entry)
