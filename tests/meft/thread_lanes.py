"""A fake device on the CPU: its lanes are threads that do their work late, so that only marks keep the order."""

import queue
import random
import threading
import time
import weakref

import torch

TIMEOUT = 60.0  # seconds after which a wait is a deadlock


class CopyFailedError(RuntimeError):
    """What a failing copy raises."""


class Mark:
    """Reached when the thread comes to it; carries the error of the work before it."""

    def __init__(self):
        self.reached = threading.Event()
        self.error = None

    def wait(self):
        if not self.reached.wait(TIMEOUT):
            raise AssertionError("deadlock: a mark is never reached")
        if self.error is not None:  # a new one each time: it holds on to the frames that it comes through
            raise CopyFailedError(str(self.error)) from self.error


def serve(work):
    """Do what comes until there comes None; hold on to nothing in between."""
    while (each := work.get()) is not None:
        each()
        del each


def poisoned(shape, dtype):
    """Memory that nobody has written into."""
    poison = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
    return torch.full(shape, poison, dtype=dtype, device="cpu")


class ThreadLane:
    """Work in the order in which it was queued, each after a delay that `lanes.delay` gives."""

    def __init__(self, lanes, name):
        self.lanes, self.name, self.error = lanes, name, None
        self.work = queue.SimpleQueue()
        threading.Thread(target=serve, args=(self.work,), name="fake lane", daemon=True).start()
        weakref.finalize(self, self.work.put, None).atexit = False

    def run(self, work, uses=()):
        number = self.lanes.count(self.name)

        def do():
            time.sleep(self.lanes.delay(self.name))
            try:
                if self.lanes.fails(self.name, number):
                    raise CopyFailedError(f"copy {number} of the {self.name} lane")
                with torch.no_grad():
                    work()
            except Exception as error:
                self.error = error

        self.work.put(do)

    def after(self, mark):
        if self.lanes.keeps("after", self.name):
            self.work.put(lambda: mark.reached.wait(TIMEOUT))

    def mark(self):
        mark = Mark()

        def reach():
            mark.error, self.error = self.error, None
            mark.reached.set()

        self.work.put(reach)
        return mark

    def empty(self, shape, dtype):
        return poisoned(shape, dtype)


class ThreadLanes:
    """The lanes of a fake device.

    The computation is the calling thread, so that what it has queued is done: its marks are reached. What it must wait
    for, it waits for in `join`, and nowhere else.

    Args:
        seed: of the delays. longest: seconds.
        failing: (lane, number) of the copies that fail.
        dropped: ("after" or "join", lane) of hand-overs that are left out, to see whether a test finds it.
    """

    def __init__(self, seed=0, longest=0.0, failing=(), dropped=()):
        self.device = torch.device("cpu")
        self.random, self.longest = random.Random(seed), longest
        self.failing, self.dropped = set(failing), set(dropped)
        self.numbers = {"inbound": 0, "outbound": 0, "updating": 0}
        self.inbound, self.outbound, self.updating = (ThreadLane(self, name) for name in self.numbers)
        self.staged = []

    def count(self, name):
        self.numbers[name] += 1
        return self.numbers[name] - 1

    def delay(self, name):
        return self.random.random() * self.longest

    def fails(self, name, number):
        return (name, number) in self.failing

    def keeps(self, what, name):
        return (what, name) not in self.dropped

    def here(self):
        mark = Mark()
        mark.reached.set()
        return mark

    def join(self, mark):
        if self.keeps("join", "inbound"):
            mark.wait()

    def use(self, tensors):
        pass

    def staging(self, shape, dtype):
        self.staged.append(poisoned(shape, dtype))
        return self.staged[-1]

    def close(self):
        for lane in (self.inbound, self.outbound, self.updating):
            lane.work.put(None)
