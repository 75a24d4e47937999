"""Which cores are numa a GPU, read from a made-up system."""

import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from meft.gradient.offload_ring import GradientRing
from meft.table.row_step import native_library
from meft.table.update_queue import UpdateQueue
from meft.transport import numa

CUDA = torch.device("cuda", 0)


@pytest.fixture
def system(monkeypatch, tmp_path):
    """Writes the NUMA node of the card at 0000:3b:00.0 and the cores of nodes."""

    def write(node, **cores):
        card = tmp_path / "pci" / "0000:3b:00.0"
        card.mkdir(parents=True)
        (card / "numa_node").write_text(f"{node}\n")
        for name, ranges in cores.items():
            (tmp_path / "node" / name).mkdir(parents=True)
            (tmp_path / "node" / name / "cpulist").write_text(ranges + "\n")

    monkeypatch.setattr(numa, "_PCI", tmp_path / "pci")
    monkeypatch.setattr(numa, "_NODES", tmp_path / "node")
    card = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setattr(numa.torch.cuda, "get_device_properties", lambda device: card)
    return write


@pytest.mark.parametrize(
    ("ranges", "cores"), [("0-3,8", {0, 1, 2, 3, 8}), ("5", {5}), ("0-1,4-5", {0, 1, 4, 5}), ("", set())]
)
def test_the_cores_of_the_cards_node(system, ranges, cores):
    system(1, node0="6-7", node1=ranges)
    assert numa.numa_cores(CUDA) == cores


def test_a_machine_that_does_not_say(system):
    assert numa.numa_cores(CUDA) == set()
    system(-1, node0="0-7")
    assert numa.numa_cores(CUDA) == set()
    assert numa.numa_cores(torch.device("cpu")) == set()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot tie threads to cores")
def test_a_thread_stays_on_the_cores_that_it_may_use(system):
    mine = sorted(os.sched_getaffinity(0))
    system(0, node0=f"{mine[-1]},4000")
    found = []

    def work():
        numa.bind_to_numa_node(CUDA)
        found.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [{mine[-1]}]
    assert sorted(os.sched_getaffinity(0)) == mine  # this one is as before


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot tie threads to cores")
def test_a_thread_that_may_use_none_of_them_is_left_alone(system):
    system(0, node0="4000-4001")
    before = os.sched_getaffinity(0)
    numa.bind_to_numa_node(CUDA)
    assert os.sched_getaffinity(0) == before


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot tie threads to cores")
def test_the_thread_that_copies_stays_near_the_device_and_the_one_that_updates_does_not(system):
    mine = os.sched_getaffinity(0)
    system(0, node0=str(max(mine)))
    streams = SimpleNamespace(device=CUDA, staging=lambda shape, dtype: torch.empty(shape, dtype=dtype))
    copies, updates = GradientRing(streams, 1, 1, torch.float32), UpdateQueue()
    assert copies._thread.submit(os.sched_getaffinity, 0).result() == {max(mine)}
    assert updates._thread.submit(os.sched_getaffinity, 0).result() == mine


UPDATE = """
import ctypes, os, sys, threading, time
library = ctypes.CDLL(sys.argv[1])
rows, width = 64, 1 << 14
grads, sums = (ctypes.c_float * (rows * width))(), (ctypes.c_double * rows)()
def update():
    os.sched_setaffinity(0, {max(cores)})
    library.meft_drain(0, 0, grads, None, sums, ctypes.c_int64(rows), ctypes.c_int64(width), 4)
    known = {os.getpid(), threading.get_native_id()}
    helpers = [int(t) for t in os.listdir("/proc/self/task") if int(t) not in known]
    last = time.monotonic() + 20  # one may not have begun: nobody waits for it
    while any(os.sched_getaffinity(t) != cores for t in helpers) and time.monotonic() < last:
        time.sleep(0.01)
    print([os.sched_getaffinity(t) == cores for t in helpers])
cores = os.sched_getaffinity(0)
thread = threading.Thread(target=update)
thread.start()
thread.join()
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot tie threads to cores")
@pytest.mark.skipif(native_library() is None, reason="there was no compiler")
def test_the_threads_of_an_update_use_all_cores_though_the_one_that_starts_them_may_not():
    call = [sys.executable, "-S", "-c", UPDATE, native_library()._name]
    assert subprocess.run(call, check=True, capture_output=True, text=True).stdout == "[True, True, True]\n"


def test_pages_are_interleaved_only_where_there_are_several_nodes(monkeypatch, tmp_path):
    monkeypatch.setattr(numa, "_NODES", tmp_path)
    memory = torch.empty(4 << 12, dtype=torch.uint8)
    assert not numa.interleave(memory)  # the system does not say
    (tmp_path / "has_memory").write_text("0")
    assert not numa.interleave(memory)
    calls = []

    class Library:
        def __init__(self, name):
            self.syscall = lambda *arguments: calls.append(arguments) or 0

    monkeypatch.setattr(numa.ctypes, "CDLL", Library)
    monkeypatch.setattr(numa.platform, "machine", lambda: "x86_64")
    (tmp_path / "has_memory").write_text("0,2")
    assert numa.interleave(memory)
    number, start, size, mode, mask, _, _ = calls[0]
    assert (number.value, start.value, size.value, mode.value) == (237, memory.data_ptr(), 4 << 12, 3)
    assert mask._obj.value == 0b101
