"""Page-locked memory on a CUDA runtime that only writes down what it is asked."""

import gc
from types import SimpleNamespace

import pytest
import torch

from meft.transfer import PageLock, page_lock, page_locked, page_unlock


class Runtime:
    """Two devices, of which the process uses the second.

    Attributes:
        calls: what was asked, in order.
        fails: names of calls that raise.
    """

    def __init__(self):
        self.calls, self.fails = [], set()
        self.initialized, self.capturing = True, False

    def note(self, name, *args):
        self.calls.append((name, *args))
        if name in self.fails:
            raise RuntimeError(f"CUDA error in {name}")
        return 0


@pytest.fixture
def runtime(monkeypatch):
    runtime = Runtime()
    library = SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: runtime.note("register", address, size),
        cudaHostUnregister=lambda address: runtime.note("unregister", address),
    )
    for name, value in {
        "is_available": lambda: True,
        "is_initialized": lambda: runtime.initialized,
        "is_current_stream_capturing": lambda: runtime.capturing,
        "device_count": lambda: 2,
        "synchronize": lambda device: runtime.note("wait", device),
        "cudart": lambda: library,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda device: device == 1, raising=False)
    return runtime


def test_memory_is_unlocked_when_it_is_freed_after_a_wait_for_the_device_in_use(runtime):
    tensor = page_locked((3, 5), torch.float32)
    address = tensor.data_ptr()
    assert runtime.calls == [("register", address, 60)]
    view = tensor[1:]
    del tensor
    gc.collect()
    assert len(runtime.calls) == 1  # the view has it still
    del view
    gc.collect()
    assert runtime.calls[1:] == [("wait", 1), ("unregister", address)]


def test_another_tensor_takes_the_place_of_the_first(runtime):
    pages, first, second = PageLock(), torch.zeros(4), torch.zeros(6)
    assert all(pages.hold(tensor) for tensor in (first, first, second))
    assert runtime.calls == [
        ("register", first.data_ptr(), 16),
        ("wait", 1),
        ("unregister", first.data_ptr()),
        ("register", second.data_ptr(), 24),
    ]


def test_a_capture_is_not_waited_for(runtime):
    runtime.capturing = True
    page_unlock(7)
    assert runtime.calls == [("unregister", 7)]


@pytest.mark.parametrize("name", ["wait", "unregister"])
def test_a_device_that_has_failed_raises_nothing(runtime, name):
    runtime.fails.add(name)
    page_unlock(7)
    assert runtime.calls == [("wait", 1), ("unregister", 7)]


def test_a_forked_child_leaves_its_parents_memory(runtime):
    """There every call of CUDA raises."""
    runtime.initialized = False
    page_unlock(7)
    assert runtime.calls == []


def test_without_cuda_nothing_is_locked(runtime, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not page_lock(torch.zeros(4))
    assert not PageLock().hold(torch.zeros(4))
    assert page_locked((2,), torch.float32).shape == (2,)
    gc.collect()
    assert runtime.calls == []
