"""The ranks of one node: which of them waits for which, by counters in memory that they share."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import select
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

_FAILED = 1
_EAGER = 20  # looks at a counter before a waiting rank sleeps: a rank may wait for this one's core
_LIVE = 0.02  # seconds between looks whether the others live
_NAP = 2e-4  # seconds of sleep where the system cannot wake a rank
_FUTEX = {"x86_64": 202, "aarch64": 98}  # number of the system call
_WAIT, _WAKE = 0, 1


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


@functools.cache
def _system_call() -> Any:
    return ctypes.CDLL(None).syscall


def _address(numbers: memoryview, rank: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(ctypes.addressof(ctypes.c_int64.from_buffer(numbers, 8 * rank)))


def _sleep(numbers: memoryview, rank: int, number: int) -> None:
    """Sleep until a rank's number is another one, or for some time."""
    call = _FUTEX.get(platform.machine())
    if call is None:
        time.sleep(_NAP)
        return
    longest = _Time(int(_LIVE), int(_LIVE % 1 * 1e9))
    # The system compares the lower half of the number.
    expected = ctypes.c_int(number & 0xFFFFFFFF)
    _system_call()(
        ctypes.c_long(call), _address(numbers, rank), ctypes.c_int(_WAIT), expected, ctypes.byref(longest), None, 0
    )


def wake(numbers: memoryview, rank: int) -> None:
    """Let the ranks go on looking that sleep until a rank's number is another one."""
    call = _FUTEX.get(platform.machine())
    if call is not None:
        everyone = ctypes.c_int(2**31 - 1)
        _system_call()(ctypes.c_long(call), _address(numbers, rank), ctypes.c_int(_WAKE), everyone, None, None, 0)


class NodeRanks:
    """The processes that share memory, in the order of their ranks.

    Args:
        rank: of this process among them.
        processes: their ids.
        numbers: int64 [4 n] in shared memory, zeros at first.
        timeout: seconds after which a wait fails.

    Attributes:
        summed: whether the gradients of the last backward pass were summed over the ranks.
        stepping: the ranks that take part in steps, ascending: all but those that have no batch left.
        barriers: at which this rank has waited for all others.
    """

    def __init__(self, rank: int, processes: Sequence[int], numbers: memoryview, timeout: float) -> None:
        self.rank, self.processes, self.timeout = rank, list(processes), timeout
        n = len(processes)
        self._status, self._arrived, *self._answers = (numbers[i * n : (i + 1) * n] for i in range(4))
        self.barriers = 0
        self._lock = threading.Lock()
        self.summed = False
        self.stepping = list(range(n))
        self._ends: dict[int, int] = {}  # rank -> a descriptor that can be read once its process has ended
        for other, process in enumerate(processes):
            if other != rank and hasattr(os, "pidfd_open"):
                with suppress(OSError):  # then the timeout alone ends a wait for it
                    self._ends[other] = os.pidfd_open(process)
                    weakref.finalize(self, os.close, self._ends[other])

    def __len__(self) -> int:
        return len(self.processes)

    @property
    def leads(self) -> bool:
        """Whether this is the node's first rank."""
        return self.rank == 0

    def publish(self, numbers: memoryview, value: int) -> None:
        """Set this rank's number, after all that this thread has written before."""
        self._order()
        numbers[self.rank] = value
        wake(numbers, self.rank)

    def wait(
        self, numbers: memoryview, least: int, *, among: Sequence[int] | None = None, left: memoryview | None = None
    ) -> bool:
        """Wait until the numbers of ranks are at least `least`; then what they wrote before can be read.

        Args:
            among: these ranks; None: all.
            left: not zero for ranks that will not come any more.

        Returns:
            whether all have come; False: the others have left.

        Raises:
            RuntimeError: a rank has ended or failed, or the timeout has passed.
        """
        looks, began = 0, time.monotonic()
        checked, among = began, range(len(self)) if among is None else among
        while behind := {rank: number for rank in among if (number := numbers[rank]) < least}:
            looks += 1
            if looks < _EAGER:
                os.sched_yield()
                continue
            if left is not None and (gone := [rank for rank in behind if left[rank]]):
                self._order()
                if any(numbers[rank] < least for rank in gone):  # none has come before it left
                    return False
            waited = (now := time.monotonic()) - began
            if now - checked > _LIVE:
                self._check(list(behind), numbers, least, waited)
                checked = now
            _sleep(numbers, *next(iter(behind.items())))
        self._order()
        return True

    def barrier(self) -> None:
        """Wait until all ranks have come here as often as this one."""
        self.barriers += 1
        self.publish(self._arrived, self.barriers)
        self.wait(self._arrived, self.barriers)

    def any(self, answer: bool) -> bool:
        """Whether any rank answers yes; all ranks ask."""
        answers = self._answers[self.barriers % 2]  # those of the last question may still be read
        answers[self.rank] = int(answer)
        self.barrier()
        return sum(answers) > 0

    def fail(self) -> None:
        """Tell the others that they wait for nothing: this rank's update has failed."""
        self._status[self.rank] = _FAILED

    def _order(self) -> None:
        """Neither the processor nor the compiler moves a read or a write of shared memory across this.

        Two rounds of a lock: each releases what came before, and the second acquires after the first has released.
        """
        for _ in range(2):
            with self._lock:
                pass

    def _check(self, behind: list[int], numbers: memoryview, least: int, waited: float) -> None:
        for rank in behind:
            reason = self._reason(rank)
            if reason is None and waited > self.timeout:
                reason = f"has not come for {waited:.0f} seconds, the timeout of the process group"
            # It may have come and ended since.
            if reason is not None and numbers[rank] < least:
                raise RuntimeError(
                    f"Rank {rank} of this node (process {self.processes[rank]}), which shares MEFT's rows with this "
                    f"one, {reason}: see its own messages, and start all ranks again from the last checkpoint."
                )

    def _reason(self, rank: int) -> str | None:
        """Why a rank will not come; None: it may."""
        if self._status[rank] == _FAILED:
            return "has failed to update them"
        if rank in self._ends:
            poll = select.poll()
            poll.register(self._ends[rank], select.POLLIN)
            if poll.poll(0):
                return "has ended"
        return None
