"""Page-locked memory on a CUDA runtime that only writes down what it is asked, and in which device's context."""

import gc
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from meft.transfer import PageLock, page_lock, page_locked, page_unlock

OTHER, DEVICE = torch.device("cuda", 0), torch.device("cuda", 1)


class Runtime:
    """Two devices; the first is current in each thread.

    Attributes:
        calls: what was asked, in order, and on which device.
        refuses: whether memory cannot be locked. fails: names of calls that raise.
        capturing: streams on which a graph is being captured.
    """

    def __init__(self):
        self.calls, self.fails, self.capturing = [], set(), set()
        self.refuses, self.initialized, self.now = False, True, threading.local()

    @property
    def device(self):
        return getattr(self.now, "device", 0)

    def stream(self, device=None):
        index = self.device if device is None else device.index
        named = getattr(self.now, "streams", {}).get(index, f"current of {index}")
        return SimpleNamespace(name=named, device=torch.device("cuda", index))

    @contextmanager
    def on(self, device):
        before, self.now.device = self.device, device.index
        try:
            yield
        finally:
            self.now.device = before

    @contextmanager
    def inside(self, stream):
        assert self.device == stream.device.index, "leaving sets the device that was current before"
        before = getattr(self.now, "streams", {})
        self.now.streams = before | {stream.device.index: stream.name}
        try:
            yield
        finally:
            self.now.streams = before

    def note(self, name, *args, device=None):
        self.calls.append((name, self.device if device is None else device.index, *args))
        if name in self.fails:
            raise RuntimeError(f"CUDA error in {name}")
        return int(name == "register" and self.refuses)


@pytest.fixture
def runtime(monkeypatch):
    runtime = Runtime()
    library = SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: runtime.note("register", address, size),
        cudaHostUnregister=lambda address: runtime.note("unregister", address),
    )
    for name, value in {
        "is_initialized": lambda: runtime.initialized,
        "is_current_stream_capturing": lambda: runtime.stream().name in runtime.capturing,
        "current_stream": runtime.stream,
        "device": runtime.on,
        "stream": runtime.inside,
        "synchronize": lambda device: runtime.note("wait", device=device),
        "cudart": lambda: library,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    real = torch.Tensor.is_pinned
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda t: bool(runtime.note("ask")) or real(t))
    return runtime


def test_memory_is_unlocked_when_it_is_freed_after_a_wait_for_its_device_alone(runtime):
    tensor = page_locked((3, 5), torch.float32, DEVICE)
    address = tensor.data_ptr()
    assert runtime.calls == [("register", 1, address, 60)]
    view = tensor[1:]
    del tensor
    gc.collect()
    assert len(runtime.calls) == 1  # the view has it still
    del view
    gc.collect()
    assert runtime.calls[1:] == [("wait", 1), ("unregister", 1, address)]
    assert runtime.device == 0


def test_another_tensor_takes_the_place_of_the_first(runtime):
    pages, first, second = PageLock(), torch.zeros(4), torch.zeros(6)
    assert all(pages.hold(tensor, DEVICE) for tensor in (first, first, second))
    assert runtime.calls == [
        ("ask", 1),
        ("register", 1, first.data_ptr(), 16),
        ("wait", 1),
        ("unregister", 1, first.data_ptr()),
        ("ask", 1),
        ("register", 1, second.data_ptr(), 24),
    ]


def test_what_goes_to_another_device_is_locked_for_that_one(runtime):
    """So that the one that reads it is the one that is waited for."""
    pages, rows = PageLock(), torch.zeros(4)
    address = rows.data_ptr()
    assert all(pages.hold(rows, device) for device in (DEVICE, OTHER, OTHER))
    del rows, pages
    gc.collect()
    assert [call for call in runtime.calls if call[0] != "ask"] == [
        ("register", 1, address, 16),
        ("wait", 1),
        ("unregister", 1, address),
        ("register", 0, address, 16),
        ("wait", 0),
        ("unregister", 0, address),
    ]


@pytest.mark.parametrize("where", ["current of 0", "current of 1", "of torch.cuda.graph"])
def test_a_capture_is_not_waited_for(runtime, monkeypatch, where):
    stream = SimpleNamespace(name="of torch.cuda.graph", device=OTHER)
    monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", stream)
    page_unlock(7, DEVICE)
    runtime.capturing = {where}
    page_unlock(8, DEVICE)
    assert runtime.calls == [("wait", 1), ("unregister", 1, 7), ("unregister", 1, 8)]


def test_a_capture_by_another_thread_is_not_waited_for(runtime, monkeypatch):
    """Whichever thread collects the garbage."""
    stream = SimpleNamespace(name="of torch.cuda.graph", device=DEVICE)
    monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", stream)
    runtime.capturing = {stream.name}
    collector = threading.Thread(target=page_unlock, args=(7, DEVICE))
    collector.start()
    collector.join()
    assert runtime.calls == [("unregister", 1, 7)]


@pytest.mark.parametrize("name", ["wait", "unregister"])
def test_a_device_that_has_failed_raises_nothing(runtime, name):
    runtime.fails.add(name)
    page_unlock(7, DEVICE)
    assert runtime.calls == [("wait", 1), ("unregister", 1, 7)]


def test_a_forked_child_leaves_its_parents_memory(runtime):
    """There every call of CUDA raises."""
    runtime.initialized = False
    page_unlock(7, DEVICE)
    assert runtime.calls == []


def test_what_the_driver_refuses_is_not_given_back(runtime, monkeypatch, caplog):
    """And its error is taken up by a launch on the same device."""
    runtime.refuses, cleared, real = True, [], torch.empty

    def empty(*size, device="cpu", **options):
        if torch.device(device).type == "cuda":
            cleared.append((torch.device(device), runtime.device))
            device = "cpu"
        return real(*size, device=device, **options)

    monkeypatch.setattr(torch, "empty", empty)
    rows = torch.zeros(4)
    assert not page_lock(rows, DEVICE)
    assert not PageLock().hold(rows, DEVICE)
    assert page_locked((2,), torch.float32, DEVICE).shape == (2,)
    assert cleared == [(DEVICE, 1)] * 3
    assert "16 bytes of MEFT rows could not be page-locked" in caplog.text
    del rows
    gc.collect()
    assert {call[0] for call in runtime.calls} == {"register", "ask"}
