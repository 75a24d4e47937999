"""A device whose computation goes on beside the thread that asks for it, and a host whose rate is shared."""

import threading
import time
from collections.abc import Callable

import torch

from benchmarks.hot_rows.link import Streams
from benchmarks.step_bound.check import Point

SLICE = 0.002  # seconds after which the host looks who shares it


class Later(Point):
    """An event of the computation: those who wait for it wait until its time."""

    def __init__(self, at: float) -> None:
        super().__init__()
        self.at = at

    def wait(self) -> None:
        """Until then."""
        time.sleep(max(0.0, self.at - time.perf_counter()))


class Device(Streams):
    """A link, and a computation that goes on while the thread that asks for it goes ahead, as on a GPU.

    Attributes:
        until: when what was asked for is done.
    """

    until = 0.0

    def compute(self, seconds: float) -> None:
        """Ask for something that takes its time."""
        self.until = max(self.until, time.perf_counter()) + seconds

    def record_event(self) -> Later:
        """What was asked for is done."""
        return Later(max(self.until, time.perf_counter()))

    def wait_event(self, event: Point) -> None:
        """What is asked for from now on begins after it; what a copy brings has to be there."""
        if not isinstance(event, Later):
            event.wait()
        self.until = max(self.until, event.at)


class Computing(torch.autograd.Function):
    """Takes its time on the device, as much forward as backward."""

    @staticmethod
    def forward(ctx, x, device, seconds):
        ctx.device, ctx.seconds = device, seconds
        device.compute(seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        ctx.device.compute(ctx.seconds)
        return g, None, None


class Host:
    """Moves bytes at a rate that threads share which ask at the same time, as they share a memory's bandwidth.

    Updates of rows give way to the others, as they do in the C++ libraries (`adapter_kernels`' helper_threads.h).
    """

    def __init__(self, rate: float) -> None:
        self.rate, self._lock = rate, threading.Lock()
        self._busy = {True: 0, False: 0}  # threads that give way, and that do not

    def _count(self, gives_way: bool, more: int) -> None:
        with self._lock:
            self._busy[gives_way] += more

    def take(self, size: float, work: Callable[[], object] = lambda: None, *, gives_way: bool = False) -> object:
        """Do some work, which takes no less than its bytes do."""
        left, last = size / self.rate, time.perf_counter()
        self._count(gives_way, 1)
        try:
            found = work()
            while True:
                now = time.perf_counter()
                if not (gives_way and self._busy[False]):
                    left -= (now - last) / self._busy[gives_way]
                last = now
                if left <= 0:
                    return found
                time.sleep(min(left, SLICE))
        finally:
            self._count(gives_way, -1)
