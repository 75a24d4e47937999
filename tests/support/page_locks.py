"""Ranks that page-lock the rows which they share, on a stand-in for the driver; what the ranks of `test_ddp.py` do."""

import gc
import logging
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from meft.optim.node import Node
from meft.table.shared_rows import Reading
from tests.support import node_tasks

REFUSED = 1  # the rank whose driver refuses one of three locks


class Driver:
    """Takes the place of CUDA's driver in a process.

    Attributes:
        locked: of each lock the address, bytes, device, and in what memory it is.
        unlocked: of each end of a lock the address, and what is there then.
    """

    def __init__(self, refuses=()):
        self.locked, self.unlocked, self._refuses = [], [], refuses
        self._devices = [torch.device("cuda", 0)]

    def cudaHostRegister(self, address, size, flags):
        refused = len(self.locked) in self._refuses
        self.locked.append((address, size, self._devices[-1], memory_at(address, size)))
        return 2 if refused else 0

    def cudaHostUnregister(self, address):
        self.unlocked.append((address, memory_at(address, 1)))

    @contextmanager
    def _inside(self, device):
        self._devices.append(torch.device(device))
        try:
            yield
        finally:
            self._devices.pop()

    @contextmanager
    def instead_of_cuda(self):
        empty = torch.empty

        def on_cpu(*args, device=None, **kwargs):
            return empty(*args, device=None if str(device).startswith("cuda") else device, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty", on_cpu)
            patch.setattr(torch.cuda, "cudart", lambda: self)
            patch.setattr(torch.cuda, "device", self._inside)
            patch.setattr(torch.cuda, "is_initialized", lambda: True)
            patch.setattr(torch.cuda, "synchronize", lambda device: None)
            patch.setattr("meft.transport.transfer._captures", lambda device: False)
            yield self


def memory_at(address, size):
    """ "shared" or "private" by the kernel's list of mappings, and "" where some of it is not mapped."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, mode, *_ = line.split()
        low, high = (int(end, 16) for end in place.split("-"))
        if low <= address and address + size <= high:
            return "shared" if mode == "rw-s" and "memfd:meft-rows" in line else "private"
    return ""


def train(tables, rank):
    """Let the ranks share tables and step them."""
    node = Node.join(tables, torch.distributed.group.WORLD)

    def average(step):
        read(tables)
        node_tasks.average(tables, node, step, rank)

    node_tasks.steps_of(tables, average, False)
    return node_tasks.state_of(tables)


def read(tables):
    """Of each table the address and the bytes of what is read."""
    with Reading(tables) as found:
        return [(rows.data_ptr(), rows.nbytes) for rows in found]


def run_locked(rank, name, refused=False):
    """Ranks train, and then each goes on by itself; then again, and the tables are gone while they are shared."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("meft.transport.transfer")
    logger.addHandler(handler)
    driver = Driver({1} if refused and rank == REFUSED else ())
    with driver.instead_of_cuda():
        tables = node_tasks.tables_of(*node_tasks.DTYPES[name], seed=rank)
        for table in tables:  # as an engine does on a GPU of the rank's own
            table.pin, table.locked_for = True, torch.device("cuda", rank)
        result = {"state": train(tables, rank), "places": read(tables), "said": list(said),
                  "pin": [table.pin for table in tables], "locked": list(driver.locked)}  # fmt: skip
        assert driver.unlocked == []
        for table in tables:
            table.leave_node()
        gc.collect()
        result["unlocked"] = list(driver.unlocked)
        result["own places"] = read(tables)
        result["own"] = driver.locked[len(result["locked"]) :]
        train(tables, rank)
        result["places again"] = read(tables)
        del driver.unlocked[:]
        del table, tables
        gc.collect()
        result["unlocked again"] = list(driver.unlocked)
        result["then"] = [memory_at(*place) for place in result["places"] + result["places again"]]
    logger.removeHandler(handler)
    return result


NAMES = {
    "the masters": ("bfloat16",),
    "a narrower copy": ("float32 read as bfloat16",),
    "refused": ("float32 read as bfloat16", True),
}


def tasks(rank):
    return {f"locked, {name}": partial(run_locked, rank, *case) for name, case in NAMES.items()}
