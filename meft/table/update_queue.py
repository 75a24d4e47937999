"""Updates of rows by a thread beside the computation, in the order in which they were queued."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class PendingUpdate:
    """A queued update that others can wait for."""

    def __init__(self, update: Callable[[], None], what: str) -> None:
        self._update, self._what = update, what
        self._thread: int | None = None
        self.future: Future[None] | None = None

    def run(self) -> None:
        """Do the update, in the calling thread."""
        self._thread = threading.get_ident()
        try:
            self._update()
        finally:
            self._thread = None
            del self._update  # releases the gradients

    @property
    def in_this_thread(self) -> bool:
        """Whether the calling thread does the update: it must not wait for itself."""
        return self._thread == threading.get_ident()

    def wait(self) -> None:
        """Raises: RuntimeError: the update failed."""
        assert self.future is not None
        try:
            self.future.result()
        except Exception as error:
            raise RuntimeError(f"The update of MEFT's {self._what} failed: {error}") from error


class UpdateQueue:
    """One thread that updates; its work has threads of its own.

    None of them is bound to a device's cores (`transport.numa`): an update uses no device, and needs the bandwidth of
    all memory.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "meft-update")
        self._end = weakref.finalize(self, self._thread.shutdown, wait=False)

    def add(self, update: Callable[[], None], what: str) -> PendingUpdate:
        """Queue an update of `what`."""
        pending = PendingUpdate(update, what)
        pending.future = self._thread.submit(pending.run)
        return pending
