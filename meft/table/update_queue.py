"""Updates of rows by a thread beside the computation."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

Update = Callable[[], bool | None]  # returns False where it was not done
Then = Callable[[], None]


class PendingUpdate:
    """A queued update that others can wait for.

    Args:
        then: called once, by the first thread that has waited, unless the update returned False.

    Attributes:
        turn: of those that may go now, the one with the lowest goes first.
    """

    def __init__(self, update: Update, what: str, then: Then | None = None, turn: int = 0) -> None:
        self._update, self._what, self._then, self.turn = update, what, then, turn
        self._waited = threading.RLock()
        self._thread: int | None = None
        self._done: Future[bool | None] = Future()

    def run(self) -> None:
        """Do the update, in the calling thread."""
        self._thread = threading.get_ident()
        try:
            done = self._update()
        except BaseException as error:
            self._release()
            self._done.set_exception(error)
        else:
            self._release()
            self._done.set_result(done)

    def _release(self) -> None:
        del self._update  # and the gradients
        self._thread = None

    @property
    def in_this_thread(self) -> bool:
        """Whether the calling thread does the update: it must not wait for itself."""
        return self._thread == threading.get_ident()

    def wait(self) -> None:
        """Raises: RuntimeError: the update failed."""
        try:
            done = self._done.result()
        except Exception as error:
            raise RuntimeError(f"The update of MEFT's {self._what} failed: {error}") from error
        with self._waited:
            then, self._then = self._then, None
            if then is not None and done is not False:
                then()


class PendingUpdates:
    """Two updates of the same rows, of which the second was queued behind the first."""

    def __init__(self, first: PendingUpdate | PendingUpdates, second: PendingUpdate) -> None:
        self._first, self._second = first, second

    @property
    def in_this_thread(self) -> bool:
        """Whether the calling thread does one of them."""
        return self._first.in_this_thread or self._second.in_this_thread

    def wait(self) -> None:
        """Raises: RuntimeError: one of them failed."""
        try:
            self._first.wait()
        finally:
            self._second.wait()


class LastUpdate:
    """The last queued update of some rows, for all threads that must wait for it.

    Attributes:
        pending: it, and one before it; None once somebody has waited for them.
    """

    def __init__(self) -> None:
        self.pending: PendingUpdate | PendingUpdates | None = None
        self._changing = threading.Lock()

    @property
    def in_this_thread(self) -> bool:
        """Whether the calling thread does it: it must not wait for itself."""
        pending = self.pending
        return pending is not None and pending.in_this_thread

    def put(self, pending: PendingUpdate) -> None:
        """An update was queued; the one before was waited for."""
        with self._changing:
            self.pending = pending

    def put_too(self, pending: PendingUpdate) -> None:
        """Another one was queued behind it."""
        with self._changing:
            self.pending = pending if self.pending is None else PendingUpdates(self.pending, pending)

    def wait(self) -> None:
        """Raises: RuntimeError: it failed, and no earlier call has said so."""
        pending = self.pending
        if pending is None:
            return
        try:
            pending.wait()
        finally:
            with self._changing:  # another thread may have queued the next one since
                if self.pending is pending:
                    self.pending = None


class UpdateQueue:
    """One thread that updates; its work has threads of its own.

    None of them is bound to a device's cores (`transport.numa`): an update uses no device, and needs the bandwidth of
    all memory.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "meft-update")
        self._end = weakref.finalize(self, self._thread.shutdown, wait=False)
        self._lock = threading.Lock()
        self._coming, self._ready = list[PendingUpdate](), list[PendingUpdate]()

    def add(
        self, update: Update, what: str, then: Then | None = None, ready: Future[Any] | None = None, turn: int = 0
    ) -> PendingUpdate:
        """Queue an update of `what` behind all that were queued before; arguments as of `PendingUpdate`.

        Args:
            ready: what it waits for, so that others may go before it; None: nothing. Updates whose wait is over go in
                their `turn`: the backward pass comes last to the rows that the next forward pass needs first.
        """
        pending = PendingUpdate(update, what, then, turn)
        with self._lock:
            self._coming.append(pending)
            if ready is None:
                for earlier in self._coming:
                    self._thread.submit(earlier.run)
                self._coming.clear()
                self._ready = []  # of those that come later
        if ready is not None:
            ready.add_done_callback(partial(self._arrived, pending))
        return pending

    def _arrived(self, pending: PendingUpdate, ready: Future[Any]) -> None:
        with self._lock:
            if pending not in self._coming:  # another was queued behind it
                return
            self._coming.remove(pending)
            self._ready.append(pending)
            try:
                self._thread.submit(self._run_first, self._ready)
                return
            except RuntimeError:  # the interpreter ends: what `atexit` calls may still save the rows
                self._ready.remove(pending)
        pending.run()

    def _run_first(self, ready: list[PendingUpdate]) -> None:
        with self._lock:
            pending = min(ready, key=lambda one: one.turn)
            ready.remove(pending)
        pending.run()
