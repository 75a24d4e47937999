"""Which cores are near a GPU, read from a made-up system."""

import os
import threading
from types import SimpleNamespace

import pytest
import torch

from meft import near
from meft.gradient_ring import GradientRing
from meft.strategies import Host
from meft.updates import UpdateQueue

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

    monkeypatch.setattr(near, "_PCI", tmp_path / "pci")
    monkeypatch.setattr(near, "_NODES", tmp_path / "node")
    card = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setattr(near.torch.cuda, "get_device_properties", lambda device: card)
    return write


@pytest.mark.parametrize(
    ("ranges", "cores"), [("0-3,8", {0, 1, 2, 3, 8}), ("5", {5}), ("0-1,4-5", {0, 1, 4, 5}), ("", set())]
)
def test_the_cores_of_the_cards_node(system, ranges, cores):
    system(1, node0="6-7", node1=ranges)
    assert near.cores_near(CUDA) == cores


def test_a_machine_that_does_not_say(system):
    assert near.cores_near(CUDA) == set()
    system(-1, node0="0-7")
    assert near.cores_near(CUDA) == set()
    assert near.cores_near(torch.device("cpu")) == set()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot tie threads to cores")
def test_a_thread_stays_on_the_cores_that_it_may_use(system):
    mine = sorted(os.sched_getaffinity(0))
    system(0, node0=f"{mine[-1]},4000")
    found = []

    def work():
        near.stay_near(CUDA)
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
    near.stay_near(CUDA)
    assert os.sched_getaffinity(0) == before


WORKERS = {
    "gradients": lambda lanes: GradientRing(lanes, 1, 1, torch.float32),
    "picks": lambda lanes: Host(lanes, []),
    "updates": lambda lanes: UpdateQueue(lanes.device),
}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot tie threads to cores")
@pytest.mark.parametrize("worker", WORKERS)
def test_the_threads_of_an_engine_stay_near_its_device(system, worker):
    last = max(os.sched_getaffinity(0))
    system(0, node0=str(last))
    made = WORKERS[worker](SimpleNamespace(device=CUDA, staging=lambda shape, dtype: torch.empty(shape, dtype=dtype)))
    assert made._thread.submit(os.sched_getaffinity, 0).result() == {last}
