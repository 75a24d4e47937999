"""Rows that an update, the computation and copy streams share: who waits for whom before rows are written or read."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from contextlib import AbstractContextManager, suppress
from typing import Any, ClassVar

import torch
from torch import Tensor

from peft_bridge.torch_private import storage_address, without_torch_function

from ..transport.host_tensors import like_rows, row_blocks
from ..transport.streams import CopyStream, StreamEvent
from ..transport.transfer import PageLock
from .dirty_rows import DirtyRows
from .node_rows import NodeRows
from .row_parameter import SWAPPED, KeptRows, State
from .update_queue import LastUpdate, PendingUpdate, Then, Update, UpdateQueue


class Reading(tuple["SharedRows", ...]):
    """A block that gets the rows of each of these as they are read, [r, d] in the compute dtype, held still until then.

    It waits for the updates of all before it holds one: an update may be queued behind another that needs what is held.
    """

    __slots__ = ()

    def __enter__(self) -> list[Tensor]:
        for rows in self:
            rows.wait_for_update()
        for rows in self:
            rows.lock.acquire()
        try:
            found = [rows.current() for rows in self]
            for rows, current in zip(self, found, strict=True):
                if rows.locked_for is not None and rows.pin and current.is_cpu:
                    rows.pin = rows._pages.hold(current, rows.locked_for)
            return found
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        for rows in self:
            rows.lock.release()


class _ReadingOne(Reading):
    __slots__ = ()

    def __enter__(self) -> Tensor:  # type: ignore[override]
        return super().__enter__()[0]


class SharedRows(KeptRows):
    """Rows with a lock, events of streams that read them, and updates that may run beside the computation.

    Copies and pickles get a lock, events and queue of their own.

    Attributes:
        name, turn: for messages; and when it is an adapter's table's turn to be read in a forward pass.
        lock: held while rows are read or written.
        updates: the thread that updates them beside the computation; None: updates happen within the step.
        node: what the ranks of this node share of the table; None: this process has a copy of its own.
        pin: whether what an engine reads is page-locked; False once that was refused.
        locked_for: the CUDA device of that engine; None: no engine reads the rows.
    """

    _of_this_process: ClassVar[frozenset[str]] = frozenset(
        ("lock", "updates", "node", "tier", "_last", "_readers", "_dirty", "_compute_copy", "_compute_copy_state")
        + ("_pages", "locked_for")
    )

    _last, lock = LastUpdate(), threading.RLock()  # of no rows: asked for before `_start`, by what adopts the rows
    node: NodeRows | None = None
    pin, turn = False, 0

    def __init__(self, rows: Tensor, *, read_as: torch.dtype, on_host: bool) -> None:
        super().__init__(rows, read_as=read_as, on_host=on_host)
        self.name = "rows"
        self._start()

    def _start(self) -> None:
        """Set what a copy or a pickle does not take over."""
        self.lock = threading.RLock()
        self.updates: UpdateQueue | None = None
        self.node = self.tier = None
        self._last = LastUpdate()
        self._readers: dict[CopyStream, StreamEvent] = {}
        self._dirty: DirtyRows | None = None
        self._pages = PageLock()
        self.locked_for: torch.device | None = None
        self._compute_copy: Tensor | None = None
        self._compute_copy_state: State | None = None

    def __getstate__(self) -> dict[str, Any]:
        self.synchronize()
        return {key: value for key, value in super().__getstate__().items() if key not in self._of_this_process}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start()

    def update_later(self, update: Update, then: Then | None = None, ready: Future[Any] | None = None) -> None:
        """Queue an update; every later access to the rows waits for it. Arguments as of `UpdateQueue.add`."""
        self.wait_for_update()
        assert self.updates is not None
        self._last.put(self.updates.add(update, self.name, then, ready, self.turn))

    def wait_for_too(self, pending: PendingUpdate) -> None:
        """Every later access to the rows waits for another update, which was queued behind that of the rows."""
        self._last.put_too(pending)

    def synchronize(self) -> None:
        """Make the rows in host memory the newest: wait for a queued update, whose error is raised once, and for the
        other ranks, and take back rows that are on a device. A thread that holds the lock waits for no update.
        """
        self.wait_for_update()
        if self.tier is not None and not self.lock._is_owned():  # type: ignore[attr-defined]
            self.tier.settle()

    def wait_for_update(self) -> None:
        """As `synchronize`, but rows that are on a device stay there, unless some of them should have come back."""
        idle = self.node is None and self.tier is None and self._last.pending is None
        if not idle and self.wait_for_queue() and self.tier is not None and self.tier.owes_rows:
            self.tier.settle()

    def wait_for_queue(self) -> bool:
        """Wait for a queued update, whose error is raised once, and for the other ranks; False: nobody may wait now."""
        if self.node is not None:
            self._watch.check_process()  # a forked process has not got what ranks wait by
        # As `threading.Condition` asks it: an update cannot begin before a lock that this thread holds is free.
        holds = self._last.in_this_thread or self.lock._is_owned()  # type: ignore[attr-defined]
        if holds and self._last.pending is not None:
            return False
        self._last.wait()
        if self.node is not None:
            self.node.wait()
        return not holds

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype in which rows are read."""
        read_as, own = self._watch.read_as, self._dtype
        return read_as if read_as.itemsize < own.itemsize else own

    @property
    def state(self) -> State:
        """Changes with every change of the masters."""
        self.wait_for_update()
        return self._state()

    @property
    def version(self) -> int:
        """Changes with every change of the masters that a backward pass must not meet."""
        if self._last.pending is not None or self.node is not None:
            self.wait_for_update()
        with without_torch_function():
            return int(self.rows._version)

    def add_reader_event(self, stream: CopyStream, event: StreamEvent) -> None:
        """A stream may go on reading what `reading` yielded until the event; it replaces the stream's earlier event."""
        self._readers[stream] = event

    def _wait_for_readers(self) -> None:
        if not self._readers:
            return
        readers, self._readers = self._readers, {}
        for event in readers.values():
            with suppress(Exception):  # raised where the copies are used; the rows are free either way
                event.wait()

    # ------------------------------------------------------------------ reading

    def reading(self) -> AbstractContextManager[Tensor]:
        """`Reading` of these alone: a block that gets the rows."""
        return _ReadingOne((self,))

    def current(self) -> Tensor:
        """The rows as they are read, [r, d] in the compute dtype; call it under the lock, after `synchronize`."""
        node = self.node
        if node is not None and not (self.is_shared and (node.entered or not node.written())):
            self._go_on_alone()  # this rank has other rows, or code that torch does not tell of has written into them
        master, dtype = self.masters, self.compute_dtype
        if self._compute_copy is not None and (
            self._compute_copy.dtype != dtype or self._compute_copy.device != master.device
        ):
            self._wait_for_readers()
            self._compute_copy = None
        if dtype == master.dtype:
            return master
        if self._compute_copy is None:
            with torch.inference_mode(False):  # it outlives the mode
                self._compute_copy, self._compute_copy_state = like_rows(master, dtype), None
        if self._compute_copy_state != self._state():  # the masters were written: loading, initialisation, the user
            self._refresh(self._compute_copy, master)
        return self._compute_copy

    def _refresh(self, compute_copy: Tensor, master: Tensor) -> None:
        self._wait_for_readers()
        for block in row_blocks(master):
            compute_copy[block].copy_(master[block])
        self._compute_copy_state = self._state()

    # ------------------------------------------------------------------ dirty rows

    def track_dirty_rows(self) -> None:
        """Begin to track which rows change; at first all are dirty."""
        self._dirty = DirtyRows(len(self.rows))

    def take_dirty_rows(self) -> Tensor | None:
        """The rows that have changed since the last call, int64 ascending (None: no row); call it under `reading`."""
        assert self._dirty is not None
        return self._dirty.take(self.state)

    # ------------------------------------------------------------------ ranks that share the table

    def take_up(self, node: NodeRows) -> Tensor:
        """Take the masters and the narrower copy that are in shared memory in place of those of this process.

        Returns:
            the masters of this process.
        """
        self.leave_node()
        self.synchronize()
        with self.lock, torch.no_grad():
            self._wait_for_readers()
            own = self.masters
            self._compute_copy = node.compute_copy()
            self._change(node.private_masters())
            self._compute_copy_state, self.node = None, node
        return own

    @property
    def masters(self) -> Tensor:
        """As of `KeptRows`; of rows that ranks share what all of them see."""
        rows = super().masters
        return self.node.masters if self.node is not None and self.node.has(rows) else rows

    def shared_rows_written(self) -> None:
        """One rank has written all masters in shared memory, and the narrower copy."""
        with self.lock:
            self.note_change()
            self._compute_copy_state = self._state()

    def write_shared(self, masters: Tensor) -> None:
        """Write the masters, and the narrower copy of them, in shared memory."""
        with self.lock, torch.no_grad():
            for block in row_blocks(masters):
                self.masters[block].copy_(masters[block])
                if self._compute_copy is not None:
                    self._compute_copy[block].copy_(self.masters[block])

    def leave_node(self) -> bool:
        """Go on with a copy of this process's own, as before anything but a step writes the rows; whether they were
        shared.
        """
        if self.node is None:
            return False
        self.synchronize()
        with self.lock:
            self._go_on_alone()
        return True

    def _go_on_alone(self) -> None:
        node = self.node
        if node is None:
            return
        node.wait()
        self._wait_for_readers()
        with torch.no_grad():
            self._watch.left = 0  # other memory was put in the place of what is shared
            self._compute_copy = self._compute_copy_state = None
            self.node = None
            if node.has(self.masters):  # with what was written into them
                self._change(like_rows(self.masters, self._dtype).copy_(self.masters))
                self._watch.left = storage_address(self.masters)
            node.release()

    @property
    def is_shared(self) -> bool:
        """Whether the ranks of this node share the rows as they are now."""
        return self.node is not None and self.node.holds(super().masters, self.compute_dtype)

    def _adopt(self, parameter: Any, read_as: torch.dtype) -> None:
        if self.tier is not None and self.tier.holds_rows and not self._settling:
            if self._last.in_this_thread:  # which cannot wait for itself
                raise RuntimeError(SWAPPED)
            self._settling = True  # in the memory of the rows before, which may be somebody's still
            try:
                self.tier.settle()
            finally:
                self._settling = False
        if self.node is not None:  # the one before may be somebody's still, and has the memory of all ranks
            self._watch.left = 0
        super()._adopt(parameter, read_as)
