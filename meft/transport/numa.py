"""Host threads on the cores that share memory with the GPU: across sockets a copy takes about twice the time.

Memory that the ranks of all sockets use is spread over theirs.
"""

from __future__ import annotations

import ctypes
import os
import platform
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

_PCI = Path("/sys/bus/pci/devices")
_NODES = Path("/sys/devices/system/node")
_MBIND = {"x86_64": 237, "aarch64": 235}  # number of the system call
_INTERLEAVE = 3  # MPOL_INTERLEAVE


def numa_cores(device: torch.device) -> set[int]:
    """The cores of the NUMA node that a CUDA device is attached to; none where the system does not report it."""
    if device.type != "cuda":
        return set()
    properties = torch.cuda.get_device_properties(device)
    pci = [getattr(properties, name, -1) for name in ("pci_domain_id", "pci_bus_id", "pci_device_id")]
    return _pci_cores("{:04x}:{:02x}:{:02x}.0".format(*pci)) if min(pci) >= 0 else set()


def _pci_cores(address: str) -> set[int]:
    """The cores of the NUMA node of a PCI address."""
    with suppress(OSError, ValueError):
        node = int((_PCI / address / "numa_node").read_text())
        if node >= 0:  # -1: the machine has one node
            return _parsed((_NODES / f"node{node}" / "cpulist").read_text())
    return set()


def _parsed(ranges: str) -> set[int]:
    """'0-3,8' -> {0, 1, 2, 3, 8}."""
    bounds = [part.split("-") for part in ranges.strip().split(",") if part]
    return {core for low, *high in bounds for core in range(int(low), int((high or [low])[0]) + 1)}


def bind_to_numa_node(device: torch.device) -> None:
    """Bind the calling thread, and those that it starts later, to the cores of the device's NUMA node, if allowed."""
    if not hasattr(os, "sched_setaffinity"):
        return
    with suppress(OSError):
        allowed = numa_cores(device) & os.sched_getaffinity(0)
        if allowed:
            os.sched_setaffinity(0, allowed)


def interleave(tensor: Tensor) -> bool:
    """Let the pages of host memory that nobody has written yet come from all NUMA nodes in turn.

    Args:
        tensor: begins on a page.

    Returns:
        whether the system does so: False where there is one node.
    """
    call = _MBIND.get(platform.machine())
    with suppress(OSError, ValueError):
        nodes = _parsed((_NODES / "has_memory").read_text())
        if call is not None and len(nodes) > 1 and max(nodes) < 63:
            mask = ctypes.c_ulong(sum(1 << node for node in nodes))
            start, size = ctypes.c_void_p(tensor.data_ptr()), ctypes.c_ulong(tensor.nbytes)
            arguments = (start, size, ctypes.c_long(_INTERLEAVE), ctypes.byref(mask), ctypes.c_ulong(64), 0)
            return bool(ctypes.CDLL(None).syscall(ctypes.c_long(call), *arguments) == 0)
    return False
