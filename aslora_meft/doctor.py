"""``aslora-meft doctor``: what this machine has, and what it reaches."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch

from adapter_kernels.rows.gather_rows import zero_copy
from adapter_kernels.runtime.host_threads import host_threads
from adapter_kernels.runtime.triton_shim import AVAILABLE
from adapter_kernels.topk import host_topk
from meft.cost.auto import left_at_peak
from meft.cost.calibration import calibrated
from meft.cost.host_memory import available_bytes
from meft.table.row_step import native_library
from meft.transport.openmp_waiting import wait_awake

PACKAGES = ("torch", "transformers", "peft", "accelerate", "triton", "bitsandbytes")
_PLACE_BYTES = 18  # of a value, with its gradient
NEEDED_BY = {
    "triton": ": needed on a GPU only",
    "bitsandbytes": ": needed by 4-bit and 8-bit bases and by its own optimizers only",
}


def report(*, anew: bool = False) -> str:
    """Versions, devices, and the calibration by which `retrieval="auto"` chooses.

    Args:
        anew: measure even if that was done before.
    """
    lines = [f"{name:<34}{_version(name)}" for name in PACKAGES]
    library = "built" if native_library() is not None else "not built: torch operations, several times slower"
    lines.append(f"{'row optimizer in C++':<34}{library}")
    picking = "built" if host_topk.native_library() is not None else "not built: torch operations, several times slower"
    lines.append(f"{'picking on the host in C++':<34}{picking}")
    available = available_bytes()
    lines.append(f"{'host memory available':<34}{f'{available / 2**30:.1f} GiB' if available else 'unknown'}")
    lines.append(f"{'threads of updates and picks':<34}{host_threads()}")
    waits = "; they wait awake: set OMP_WAIT_POLICY=PASSIVE" if wait_awake() else ""
    lines.append(f"{'threads of torch':<34}{torch.get_num_threads()}{waits}")
    if not torch.cuda.is_available():
        lines.append(f"{'CUDA':<34}none: MEFT reads rows in place; what follows is of copies in host memory")
    for device in _devices():
        if device.type == "cuda":
            lines.append(f"{device!s:<34}{torch.cuda.get_device_name(device)}")
            lines.append(f"{'  kernels read host memory':<34}{_reads_host_memory(device)}")
        lines.append(f"{'  left for device_rows=auto now':<34}{_left_for_rows(device)}")
        lines += ["", str(calibrated(device, anew=anew))]
    return "\n".join(lines)


def _left_for_rows(device: torch.device) -> str:
    """Without a model on it; with float32 masters and moments, and rows that are read in bfloat16."""
    free = left_at_peak(device)
    if not free:
        return "none: rows get places on CUDA devices"
    return f"{free / 2**30:.1f} GiB, {free // (2 * _PLACE_BYTES * 4096):,} neurons of 4,096 values"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed" + NEEDED_BY.get(name, "")


def _devices() -> list[torch.device]:
    found = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return found or [torch.device("cpu")]


def _reads_host_memory(device: torch.device) -> str:
    if not AVAILABLE:
        return "no: triton is not installed"
    return "yes" if zero_copy(device, probe=torch.zeros(1).pin_memory()) else "no: rows are staged"
