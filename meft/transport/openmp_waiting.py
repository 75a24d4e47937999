"""Warns once if OpenMP's threads busy-wait beside other work.

Torch's parallel operations then take longer, some of them thirty times as long, where the threads share cores with the
thread that updates rows or with another process. A library cannot set the policy, which is read when torch is imported.
The threads of our own loops sleep.
"""

from __future__ import annotations

import functools
import logging
import os

import torch

logger = logging.getLogger(__name__)


def wait_awake() -> bool:
    """Whether torch has OpenMP threads and no variable makes them sleep while they wait."""
    if torch.get_num_threads() < 2 or not torch.backends.openmp.is_available():
        return False
    sleeping = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
    return all(os.environ.get(name, "").strip().lower() != value for name, value in sleeping.items())


def check_waiting(*, updates_beside: bool = False) -> None:
    """Log a warning, once a process, if threads busy-wait and other work goes on.

    Args:
        updates_beside: rows are updated by a thread beside the computation. Other processes are known from
            LOCAL_WORLD_SIZE, as torchrun and accelerate set it.
    """
    if (updates_beside or os.environ.get("LOCAL_WORLD_SIZE", "1").strip() not in ("", "1")) and wait_awake():
        _say()


@functools.cache
def _say() -> None:
    logger.warning(
        "MEFT: OMP_WAIT_POLICY is %s, so torch's CPU threads wait awake and slow down what runs beside them; set "
        "OMP_WAIT_POLICY=PASSIVE before Python starts.",
        os.environ.get("OMP_WAIT_POLICY") or "not set",
    )
