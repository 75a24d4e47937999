"""A stand-in for `torch.cuda` that writes down what it is asked, under the real `CudaStreams`.

The computation's stream is done at once. What is queued on any other stream is done as late as can be: when somebody
waits for an event behind it. So whoever reads too early reads what was there before.
"""

import sys
import threading
import types
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from meft.transport.streams import _Stream


class Used(TorchDispatchMode):
    """Notes the memory of every tensor that an operation takes or gives."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                self.found[tensor.untyped_storage().data_ptr()] = tensor
        return result


def gather_by_ids_of_the_device(rows, host_rows, tables, out):
    """As a GPU does it: the host's ids are not looked at."""
    for table, buffer in zip(tables, out, strict=True):
        torch.index_select(table, 0, rows, out=buffer)


class Stream:
    """Work in its order.

    Attributes:
        queued: what is not done yet: callables, in order. waits: events that it was told to wait for.
    """

    def __init__(self, cuda, device, priority=0):
        self.cuda, self.device, self.priority = cuda, device, priority
        self.queued, self.waits, self.done = [], [], 0

    def add(self, work):
        """A number by which `reach` finds it."""
        with self.cuda.lock:
            self.queued.append(work)
            return self.done + len(self.queued)

    def reach(self, number):
        """Do all work up to a number."""
        with self.cuda.lock:
            while self.done < number:
                work = self.queued.pop(0)
                self.done += 1
                work()

    def wait_event(self, event):
        assert event.stream is not None, "an event that was never recorded: nothing is waited for"
        self.waits.append(event)
        self.cuda.notes.append(("wait", self, event))
        if self is self.cuda.computation:
            event.stream.reach(event.number)
        else:
            self.add(lambda: event.stream.reach(event.number))


class Event:
    """A point in a stream, if it was recorded."""

    def __init__(self, cuda, blocking=False):
        self.cuda, self.blocking, self.stream, self.number = cuda, blocking, None, 0

    def record(self, stream):
        self.stream = stream
        self.number = stream.add(lambda: None) if stream is not self.cuda.computation else 0
        self.cuda.notes.append(("record", stream, self))

    def synchronize(self):
        assert self.stream is not None, "an event that was never recorded: nothing is waited for"
        self.cuda.notes.append(("synchronize", None, self))
        self.stream.reach(self.number)


class FakeCuda:
    """Takes the place of `torch.cuda` as far as `meft.transport.streams` asks for it.

    Attributes:
        notes: ("record" | "wait" | "synchronize", stream, event) in order.
        recorded: streams for which `record_stream` was called, by the address of a tensor's memory.
        used: (stream, memory) of what was done on streams.
        staged: host memory that was asked for. asked: devices of `current_stream`.
        locked: (address, device) of memory that was page-locked where it lies.
        made: (stream, address) of memory that a stream gave; it holds no numbers yet.
        full: whether queueing fails.
    """

    def __init__(self, monkeypatch, device="cpu"):
        self.device, self.lock = torch.device(device), threading.RLock()
        self.notes, self.recorded, self.used, self.staged, self.asked = [], {}, [], [], []
        self.made, self.locked, self.full = [], [], False
        self.inside = threading.local()  # a thread has a current stream of its own
        self.computation = Stream(self, self.device)
        self.streams = []
        named = {
            "Stream": self._stream, "Event": lambda **fields: Event(self, **fields), "stream": self._inside,
            "current_stream": self._current, "device": self._on,
        }  # fmt: skip
        for name, value in named.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr("meft.transport.streams.page_locked", self._staging)
        monkeypatch.setattr("meft.transport.transfer.page_lock", self._lock)
        # What streams are given as a tensor of the computation lies on the device, as far as they can tell.
        there = property(lambda tensor: sys._getframe(1).f_globals["__name__"] == "meft.transport.streams")
        monkeypatch.setattr(torch.Tensor, "is_cuda", there)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self._record(tensor, stream))
        monkeypatch.setattr("meft.retrieval.gather.bring_rows", gather_by_ids_of_the_device)
        self._late(monkeypatch)

    def _late(self, monkeypatch):
        """Work that a stream queues is done later."""
        run = _Stream.run

        def late(stream, work, uses=()):
            def queue():
                assert self._current(self.device) is stream.stream, "work on a stream that is not the stream's"
                assert self.inside.device == self.device, "leaving the stream makes a context on the device before"
                if self.full:
                    raise RuntimeError("nothing more can be queued")
                stream.stream.add(lambda: self._do(stream.stream, work))

            run(stream, queue, uses)

        monkeypatch.setattr(_Stream, "run", late)
        empty = _Stream.empty

        def poisoned(stream, shape, dtype):
            inside = len(self.entered)
            made = empty(stream, shape, dtype)
            assert self.entered[inside:] == [stream.stream], "memory that is not of the stream"
            self.made.append((stream.stream, made.untyped_storage().data_ptr()))
            return made.fill_(self._poison(dtype))

        monkeypatch.setattr(_Stream, "empty", poisoned)

    def _do(self, stream, work):
        with torch.no_grad(), Used() as used:
            work()
        self.used += [(stream, tensor) for tensor in used.found.values()]

    @property
    def entered(self):
        """Streams that this thread has entered, in order."""
        return self.inside.__dict__.setdefault("entered", [])

    @property
    def current(self):
        """Streams of this thread's `with` blocks."""
        return self.inside.__dict__.setdefault("streams", [])

    def _stream(self, device, priority=0):
        self.streams.append(Stream(self, device, priority))
        return self.streams[-1]

    @contextmanager
    def _on(self, device):
        before, self.inside.device = getattr(self.inside, "device", None), device
        try:
            yield
        finally:
            self.inside.device = before

    @contextmanager
    def _inside(self, stream):
        self.current.append(stream)
        self.entered.append(stream)
        try:
            yield
        finally:
            self.current.pop()

    def _current(self, device=None):
        self.asked.append(device)
        return self.current[-1] if self.current else self.computation

    def _lock(self, tensor, device):
        self.locked.append((tensor.data_ptr(), device))
        return True

    @staticmethod
    def _poison(dtype):
        return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min

    def _staging(self, shape, dtype, device):
        assert device == self.device
        self.staged.append(torch.full(shape, self._poison(dtype), dtype=dtype, device="cpu"))
        return self.staged[-1]

    def _record(self, tensor, stream):
        self.recorded.setdefault(tensor.untyped_storage().data_ptr(), []).append(stream)


OURS = ("meft", "adapter_kernels", "peft_bridge", "aslora")


def forbid_cuda(monkeypatch):
    """A machine with CUDA that nothing may touch: what asks for a context raises, and so does whatever else the
    packages call of `torch.cuda`, except whether others have initialised it.
    """
    for name, value in vars(torch.cuda).items():
        if isinstance(value, types.FunctionType | type) and not name.startswith("_") and name != "is_initialized":
            monkeypatch.setattr(torch.cuda, name, _refusing(name, value))
    monkeypatch.setattr(torch.cuda, "is_available", _refusing("is_available", lambda: True))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "_lazy_init", _failing)


def _failing():
    raise AssertionError("a CUDA context was asked for")


def _refusing(name, value):
    def refusing(*args, **kwargs):
        caller = sys._getframe(1).f_globals["__name__"]
        assert caller.split(".")[0] not in OURS, f"{caller} called torch.cuda.{name}"
        return value(*args, **kwargs)

    return refusing
