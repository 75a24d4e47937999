"""Rows that an update, the computation and copy streams share: who waits for whom before rows are written or read."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..transport.streams import CopyStream, StreamEvent
from .dirty_rows import DirtyRows
from .node_rows import NodeRows
from .row_parameter import KeptRows, State
from .update_queue import PendingUpdate, UpdateQueue


class SharedRows(KeptRows):
    """Rows with a lock, events of streams that read them, and updates that may run beside the computation.

    Copies and pickles get a lock, events and queue of their own.

    Attributes:
        name: for messages.
        lock: held while rows are read or written.
        updates: the thread that updates them beside the computation; None: updates happen within the step.
        node: what the ranks of this node share of the table; None: this process has a copy of its own.
    """

    _of_this_process: ClassVar[frozenset[str]] = frozenset(
        ("lock", "updates", "node", "_pending", "_readers", "_dirty")
    )

    _pending: PendingUpdate | None = None  # asked for before `_start`, by what adopts the rows
    node: NodeRows | None = None

    def __init__(self, rows: Tensor, *, read_as: torch.dtype, on_host: bool) -> None:
        super().__init__(rows, read_as=read_as, on_host=on_host)
        self.name = "rows"
        self._start()

    def _start(self) -> None:
        """Set what a copy or a pickle does not take over."""
        self.lock = threading.RLock()
        self.updates: UpdateQueue | None = None
        self.node = None
        self._pending = None
        self._readers: dict[CopyStream, StreamEvent] = {}
        self._dirty: DirtyRows | None = None

    def __getstate__(self) -> dict[str, Any]:
        self.synchronize()
        return {key: value for key, value in super().__getstate__().items() if key not in self._of_this_process}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start()

    def update_later(self, update: Callable[[], None]) -> None:
        """Queue an update; every later access to the rows waits for it."""
        self.synchronize()
        assert self.updates is not None
        self._pending = self.updates.add(update, self.name)

    def synchronize(self) -> None:
        """Wait for the update that is queued, if there is one, and for the other ranks; raises its error, once."""
        pending = self._pending
        if pending is not None:
            if pending.in_this_thread:
                return
            try:
                pending.wait()
            finally:
                if self._pending is pending:
                    self._pending = None
        if self.node is not None:
            self.node.wait()

    @property
    def state(self) -> State:
        """Changes with every change of the masters."""
        self.synchronize()
        return self._state()

    @property
    def version(self) -> int:
        """Changes with every change of the masters that a backward pass must not meet."""
        self.synchronize()
        return self._writes()

    def add_reader_event(self, stream: CopyStream, event: StreamEvent) -> None:
        """A stream may go on reading what `reading` yielded until the event; it replaces the stream's earlier event."""
        self._readers[stream] = event

    def _wait_for_readers(self) -> None:
        readers, self._readers = self._readers, {}
        for event in readers.values():
            with suppress(Exception):  # raised where the copies are used; the rows are free either way
                event.wait()

    def track_dirty_rows(self) -> None:
        """Begin to track which rows change; at first all are dirty."""
        self._dirty = DirtyRows(len(self.rows))

    def take_dirty_rows(self) -> Tensor | None:
        """The rows that have changed since the last call, int64 ascending (None: no row); call it under `reading`."""
        assert self._dirty is not None
        return self._dirty.take(self.state)
