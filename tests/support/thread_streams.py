"""A fake device on the CPU: its streams are threads that do their work late, so that only marks keep the order."""

import queue
import random
import threading
import time
import weakref

import torch

TIMEOUT = 60.0  # seconds after which a wait is a deadlock


class CopyFailedError(RuntimeError):
    """What a failing copy raises."""


class StreamEvent:
    """Reached when the thread comes to it; carries the error of the work before it."""

    def __init__(self):
        self.reached = threading.Event()
        self.error = None

    def wait(self):
        if not self.reached.wait(TIMEOUT):
            raise AssertionError("deadlock: an event is never reached")
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


class ThreadStream:
    """Work in the order in which it was queued, each after a delay that `streams.delay` gives."""

    def __init__(self, streams, name):
        self.streams, self.name, self.error = streams, name, None
        self.work = queue.SimpleQueue()
        threading.Thread(target=serve, args=(self.work,), name="fake stream", daemon=True).start()
        weakref.finalize(self, self.work.put, None).atexit = False

    def run(self, work, uses=()):
        number = self.streams.count(self.name)

        def do():
            time.sleep(self.streams.delay(self.name))
            try:
                if self.streams.fails(self.name, number):
                    raise CopyFailedError(f"copy {number} of the {self.name} stream")
                with torch.no_grad():
                    work()
            except Exception as error:
                self.error = error

        self.work.put(do)

    def wait_event(self, event):
        if self.streams.keeps("after", self.name):
            self.work.put(lambda: event.reached.wait(TIMEOUT))

    def record_event(self):
        event = StreamEvent()

        def reach():
            event.error, self.error = self.error, None
            event.reached.set()

        self.work.put(reach)
        return event

    def empty(self, shape, dtype):
        with torch.inference_mode(False):  # a thread writes into it
            return poisoned(shape, dtype)


class ThreadStreams:
    """The streams of a fake device.

    The computation is the calling thread, so that what it has queued is done: its marks are reached. What it must wait
    for, it waits for in `join`, and nowhere else.

    Args:
        seed: of the delays. longest: seconds.
        failing: (stream, number) of the copies that fail.
        dropped: ("after" or "join", stream) of hand-overs that are left out, to see whether a test finds it.
    """

    def __init__(self, seed=0, longest=0.0, failing=(), dropped=()):
        self.device = torch.device("cpu")
        self.random, self.longest = random.Random(seed), longest
        self.failing, self.dropped = set(failing), set(dropped)
        self.numbers = {"inbound": 0, "outbound": 0, "updating": 0}
        self.inbound, self.outbound, self.updating = (ThreadStream(self, name) for name in self.numbers)
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

    def record_event(self):
        event = StreamEvent()
        event.reached.set()
        return event

    def wait_event(self, event):
        if self.keeps("join", "inbound"):
            event.wait()

    def use(self, tensors):
        pass

    def staging(self, shape, dtype):
        self.staged.append(poisoned(shape, dtype))
        return self.staged[-1]

    def close(self):
        for stream in (self.inbound, self.outbound, self.updating):
            stream.work.put(None)


def on_streams(model, **fields):
    """Let the model's engines take fake streams; updates run beside the computation too, then."""
    streams = ThreadStreams(**fields)
    for engine in model.base_model.engines.values():
        engine.use(streams)
    return streams
