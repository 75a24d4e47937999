"""Whether the host has the memory for an adapter's rows, asked before any of it is taken."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from adapter_kernels.adamw.moment_layout import MODES, moment_bytes

from ..config import MEFTConfig
from ..targets import FFN

OVERRIDE = "ASLORA_MEFT_HOST_GIB"  # GiB that may be taken, whatever the system says


def available_bytes(root: Path = Path("/")) -> int | None:
    """Host memory that can be taken: what `ASLORA_MEFT_HOST_GIB` says, else the least of what the system and the
    control groups of this process (versions 1 and 2: containers, batch jobs) have left without swapping.

    Args:
        root: where /proc and /sys are.

    Returns:
        bytes; None where nothing says.

    Raises:
        ValueError: the variable is no number.
    """
    if given := os.environ.get(OVERRIDE):
        try:
            return int(float(given) * 2**30)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{OVERRIDE}={given!r} is no number of GiB: set it to e.g. 64, or unset it.") from error
    left = _left_in_groups(root)
    with suppress(OSError, StopIteration, ValueError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        left.append(next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")))
    return min(left, default=None)


def _left_in_groups(root: Path) -> list[int]:
    """Bytes that are left in each control group, and those around it, that limits this process."""
    left: list[int] = []
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if not kinds:
                top, limit, used, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
            elif "memory" in kinds.split(","):
                top, limit, used = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
                cache = "total_inactive_file"
            else:
                continue
            group = top / path.strip("/")
            # In a container the path may be that of the host, which is not there; what limits it is at the top then.
            for folder in (group, *group.parents):
                with suppress(OSError, ValueError):  # no limit ("max"), or no such group
                    most, taken = (int((folder / name).read_text()) for name in (limit, used))
                    left.append(max(0, most - taken + _cache(folder, cache)))
                if folder == top:
                    break
    return left


def _cache(group: Path, name: str) -> int:
    """Bytes of file cache that the system gives up when memory is wanted."""
    with suppress(OSError, StopIteration, ValueError):
        lines = (group / "memory.stat").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.split()[:1] == [name])
    return 0


def row_bytes(config: MEFTConfig, d: int, layers: int, compute: int) -> int:
    """Bytes of an adapter's rows in host memory: masters, the narrower copy that is read, and moments where it trains.

    Args:
        compute: bytes of a value as it is read.
    """
    master = {"float64": 8, "float32": 4, "bfloat16": 2}[config.master_dtype]
    kept = getattr(torch, config.master_dtype)
    moments = 0 if config.inference_mode else moment_bytes(config.row_rule.moments, d, kept)
    return 2 * layers * config.r * (d * (master + (compute if compute < master else 0)) + moments)


def narrower(config: MEFTConfig) -> dict[str, MEFTConfig]:
    """Ways to keep an adapter's rows in less memory: what is to be set -> the configuration with it."""
    found = {}
    masters = ("float64", "float32", "bfloat16")
    for master in masters[masters.index(config.master_dtype) :]:
        for mode in MODES[MODES.index(config.row_rule.moments) :]:
            changes = [f"master_dtype='{master}'"] if master != config.master_dtype else []
            changes += [f"moments='{mode}' of row_optimizer"] if mode != config.row_rule.moments else []
            with suppress(ValueError):  # such as zero_copy, which has float32 moments only
                rule = replace(config.row_rule, moments=mode)
                if changes:
                    found[" and ".join(changes)] = replace(config, master_dtype=master, row_optimizer=rule)
    return found


def require_memory(wanted: int, config: MEFTConfig, layers: int, others: Mapping[str, int] | None = None) -> None:
    """Check that the host has memory for an adapter's rows.

    Args:
        wanted: bytes.
        layers: adapted FFNs.
        others: what can be set -> bytes that are wanted then.

    Raises:
        MemoryError: more is wanted than there is.
    """
    available = available_bytes()
    if available is None or wanted <= available:
        return
    fits = int(config.r * available / wanted) // config.experts * config.experts
    remedy = f"use r={fits} or less" if fits else "use a machine with more memory"
    enough = {text: size for text, size in (others or {}).items() if size <= available}
    if enough:  # the least change
        text = max(enough, key=lambda text: enough[text])
        remedy = f"set {text} ({enough[text] / 2**30:.1f} GiB), {remedy}"
    raise MemoryError(
        f"r={config.r} in {layers} layers takes {wanted:,} bytes of host memory ({wanted / 2**30:.1f} GiB), and "
        f"{available:,} ({available / 2**30:.1f} GiB) are available: {remedy}, or adapt fewer layers "
        f"(layers_to_transform); where memory grows as it is used, set {OVERRIDE} to the GiB that may be taken."
    )


def require_memory_for(config: MEFTConfig, ffns: Sequence[FFN]) -> None:
    """Raises: MemoryError: the rows of an adapter beside these FFNs want more host memory than there is."""
    parameters = [p for ffn in ffns for p in ffn.module.parameters()]
    if not config.on_host or not ffns or any(p.is_meta for p in parameters):
        return
    compute = min((p.element_size() for p in parameters if p.is_floating_point()), default=4)
    if config.row_dtype != "auto":
        compute = getattr(torch, config.row_dtype).itemsize

    def wanted(config: MEFTConfig) -> int:
        return sum(row_bytes(config, ffn.width, 1, compute) for ffn in ffns)

    require_memory(wanted(config), config, len(ffns), {text: wanted(c) for text, c in narrower(config).items()})
