"""How many threads the loops that are not torch's use: the row update of `meft` and `expert_topk` in host memory.

One for each physical core that this process may use, over the processes that share the machine: torch's own number is
no guide, since torchrun sets OMP_NUM_THREADS=1 where there are several. The environment variable `ASLORA_MEFT_THREADS`
sets another number (a whole number, at least 1): where each process is tied to cores of its own, say.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["host_threads"]

VARIABLE = "ASLORA_MEFT_THREADS"
_CPUS = Path("/sys/devices/system/cpu")
_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def host_threads() -> int:
    """Threads for a loop of this process, at least 1.

    `ASLORA_MEFT_THREADS`, or else: the physical cores that the process may use (its affinity), at most what the control
    group's quota gives, over LOCAL_WORLD_SIZE, the processes that torchrun or accelerate started here.

    Raises:
        ValueError: `ASLORA_MEFT_THREADS` or LOCAL_WORLD_SIZE is no whole number, or below 1.
    """
    if (own := _number(VARIABLE)) is not None:
        return own
    return max(1, _cores() // (_number("LOCAL_WORLD_SIZE") or 1))


def _number(variable: str) -> int | None:
    text = os.environ.get(variable, "").strip()
    if not text:
        return None
    with suppress(ValueError):
        if (number := int(text)) >= 1:
            return number
    raise ValueError(f"{variable}={text!r} must be a whole number, at least 1; unset it to have one chosen.")


def _cores() -> int:
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    return min(_physical(frozenset(os.sched_getaffinity(os.getpid()))), _quota())


@functools.cache
def _physical(cpus: frozenset[int]) -> int:
    """Physical cores of some logical ones; as many as those where the system does not say."""
    return len({_siblings(cpu) for cpu in cpus})


def _siblings(cpu: int) -> str:
    """What is the same for logical processors of one core."""
    with suppress(OSError):
        return (_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
    return str(cpu)


@functools.cache
def _quota() -> int:
    """The cores' worth of time that the control group gets; more than there are where it has no limit."""
    return max(1, math.floor(min(_limits(), default=1 << 30)))


def _limits() -> Iterator[float]:
    """Cores of each limit, of this process's group and of those above: version 2's `cpu.max`, version 1's pair."""
    with suppress(OSError):
        for line in _MEMBERSHIP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            root = _CGROUPS if not controllers else _CGROUPS / "cpu"
            # In a container the path is the host's, while its own group lies at the root.
            group = root / path.lstrip("/")
            for folder in (group, *group.parents):
                yield from _limit_of(folder)
                if folder == root:
                    break


def _limit_of(folder: Path) -> Iterator[float]:
    with suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()
        if quota != "max":
            yield int(quota) / int(period)
    with suppress(OSError, ValueError):
        quota = (folder / "cpu.cfs_quota_us").read_text()
        if int(quota) > 0:
            yield int(quota) / int((folder / "cpu.cfs_period_us").read_text())
