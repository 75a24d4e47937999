"""What this machine reaches: the ceilings that `meft.cost.step_time` reckons with, measured in seconds and kept.

The link is measured twice: alone, and while the row optimizer's threads use the host's memory, as in training. It may
come in the middle of the first forward pass: at most 0.25 GiB of the device is used at a time, and given back.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import torch

from adapter_kernels.adamw.moment_layout import MODES
from adapter_kernels.runtime.host_threads import host_threads
from peft_bridge import replace_file

from ..config import MEFTConfig
from ..routing.topk import select_neurons
from ..table.gpu_step import ZeroCopySteps
from ..table.moments import Moments
from ..table.row_step import StepRule, update_rows
from ..transport.streams import streams_of
from ..transport.transfer import Traffic
from .step_time import Ceilings

logger = logging.getLogger(__name__)

_VERSION = 4  # of the file


@dataclass(frozen=True)
class Sizes:
    """What is measured with.

    Attributes:
        copied: bytes of a copy over the link. on_device: of one on the device. gemm: side of a product.
        d, r, updated: hidden size, neurons and updated rows of a table. tokens: that the host picks for.
        repeats: of each measurement, whose median counts.
    """

    copied: int = 64 << 20
    on_device: int = 128 << 20
    gemm: int = 4096
    d: int = 4096
    r: int = 2048
    updated: int = 1024
    tokens: int = 512
    repeats: int = 5


@dataclass(frozen=True)
class Calibration:
    """Measured ceilings.

    Attributes:
        machine: what they were measured on.
        alone: with nothing beside. contended: with the row optimizer's threads at work.
        zero_copy: bytes/s of the row optimizer by a kernel of the device, of the same bytes as `host_bytes`; None where
            there is no such device, or it cannot reach the host's memory.
        modes: how moments are kept -> values/s of the row optimizer with bfloat16 masters.
    """

    machine: str
    alone: Ceilings
    contended: Ceilings
    zero_copy: float | None = None
    modes: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.machine}", f"{'':<34}{'alone':>12}{'beside updates':>18}"]
        names = {
            "to_device": ("host to device, GB/s", 1e9),
            "to_host": ("device to host, GB/s", 1e9),
            "both_ways": ("both ways at once, sum, GB/s", 1e9),
            "host_bytes": ("row optimizer, GB/s", 1e9),
            "host_flops": ("picking on the host, Gflop/s", 1e9),
            "device_bytes": ("device memory, GB/s", 1e9),
            "flops": ("16-bit GEMM, Tflop/s", 1e12),
        }
        for name, (label, unit) in names.items():
            pair = getattr(self.alone, name) / unit, getattr(self.contended, name) / unit
            lines.append(f"{label:<34}{pair[0]:>12.1f}{pair[1]:>18.1f}")
        if self.zero_copy is not None:
            lines.append(f"{'row optimizer, zero_copy, GB/s':<34}{self.zero_copy / 1e9:>12.1f}")
        lines += [
            f"{f'row updates, moments={mode}, Gvalues/s':<46}{rate / 1e9:.2f}" for mode, rate in self.modes.items()
        ]
        return "\n".join(lines)


class _Machine:
    """The measurements."""

    def __init__(self, device: torch.device, sizes: Sizes) -> None:
        self.device, self.sizes = device, sizes
        self.half = torch.float16 if device.type == "cuda" else torch.float32  # older cards have no fast bf16
        self.table = torch.zeros(sizes.r, sizes.d, device="cpu")
        self.compute_copy = torch.zeros(sizes.r, sizes.d, dtype=torch.bfloat16, device="cpu")
        self.state = Moments.fresh(self.table).row_state(self.table, self.compute_copy)
        shuffled = torch.randperm(sizes.r, generator=torch.Generator().manual_seed(0), device="cpu")
        self.rows = shuffled[: sizes.updated].sort().values
        self.gradient = torch.full((sizes.updated, sizes.d), 1e-3, device="cpu")

    def seconds(self, work: Callable[[], object]) -> float:
        """Median seconds of some work, after a first time."""
        found = []
        for _ in range(self.sizes.repeats + 1):
            self._finish()
            began = time.perf_counter()
            work()
            self._finish()
            found.append(time.perf_counter() - began)
        return max(median(found[1:]), 1e-9)

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def update(self, step: Callable[..., None] = update_rows) -> None:
        rule = StepRule(0.0, 0.9, 0.999, 1e-8, 0.0, True)
        step(self.state, self.rows, self.gradient, rule, seed=0)

    @contextmanager
    def updates_beside(self) -> Iterator[None]:
        """The optimizer's threads at work inside of the block."""
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                self.update()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def link(self) -> tuple[float, float, float]:
        """Bytes/s to the device, to the host, and the sum of both at once."""
        n = self.sizes.copied
        here = [streams_of(self.device).staging((n,), torch.uint8).zero_() for _ in range(2)]
        there = [torch.zeros(n, dtype=torch.uint8, device=self.device) for _ in range(2)]
        beside = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

        def both() -> None:
            there[0].copy_(here[0], non_blocking=True)
            with torch.cuda.stream(beside):
                here[1].copy_(there[1], non_blocking=True)

        up = n / self.seconds(lambda: there[0].copy_(here[0], non_blocking=True))
        down = n / self.seconds(lambda: here[1].copy_(there[1], non_blocking=True))
        return up, down, 2 * n / self.seconds(both)

    def device_rates(self) -> tuple[float, float]:
        """Flop/s of a 16-bit GEMM (32-bit on a CPU), bytes/s of a copy on the device, read and written."""
        side, n = self.sizes.gemm, self.sizes.on_device
        a, b = (torch.ones(side, side, dtype=self.half, device=self.device) for _ in range(2))
        c, (target, source) = torch.empty_like(a), torch.zeros(2, n, dtype=torch.uint8, device=self.device)
        product, copy = self.seconds(lambda: torch.mm(a, b, out=c)), self.seconds(lambda: target.copy_(source))
        return 2 * side**3 / product, 2 * n / copy

    @property
    def updated_bytes(self) -> int:
        """What a row update reads and writes."""
        return self.gradient.nbytes + self.sizes.updated * self.state.row_bytes()

    def host_rates(self) -> tuple[float, float]:
        """Bytes/s of a row update, flop/s of picking on the host."""
        return self.updated_bytes / self.seconds(self.update), self.picking()

    def zero_copy(self) -> float | None:
        """Bytes/s of a row update by the device; the tables are page-locked by it."""
        if self.device.type != "cuda":
            return None
        steps = ZeroCopySteps(streams_of(self.device), self.sizes.d)
        seconds = self.seconds(partial(self.update, partial(steps, Traffic())))
        return None if steps.refused else self.updated_bytes / seconds

    def modes(self) -> dict[str, float]:
        """Values/s of a row update for each way to keep moments, with bfloat16 masters."""
        own, values, rates = self.state, self.sizes.updated * self.sizes.d, {}
        for mode in MODES:
            self.state = Moments.fresh(self.compute_copy, mode).row_state(self.compute_copy)
            rates[mode] = values / self.seconds(self.update)
        self.state = own
        return rates

    def picking(self) -> float:
        """Flop/s of picking on the host, of what `host` does: routing and scoring, by keys in bf16."""
        config = MEFTConfig(r=self.sizes.r, top_k=min(64, self.sizes.r))
        random = torch.Generator().manual_seed(0)
        x = torch.randn(self.sizes.tokens, self.sizes.d, generator=random, device="cpu")
        logits = torch.randn(self.sizes.tokens, config.experts, generator=random, device="cpu")
        candidates = config.probed * config.r // config.experts
        flops = 2 * self.sizes.tokens * candidates * self.sizes.d
        return flops / self.seconds(lambda: select_neurons(x, logits, self.compute_copy, config))


def measure(device: torch.device, sizes: Sizes | None = None) -> Calibration:
    """Measure a machine and one of its devices, in a few seconds.

    Raises:
        torch.OutOfMemoryError: the device has not even the memory for that.
    """
    try:
        return _measured(device, sizes)
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # once on a machine: its file is kept


def _measured(device: torch.device, sizes: Sizes | None) -> Calibration:
    machine = _Machine(device, sizes or (Sizes() if device.type == "cuda" else Sizes(gemm=1024)))
    flops, device_bytes = machine.device_rates()
    host_bytes, picking = machine.host_rates()
    alone = Ceilings(flops, device_bytes, *machine.link(), host_bytes, picking)
    with machine.updates_beside():
        link, beside = machine.link(), machine.picking()
    contended = Ceilings(flops, device_bytes, *link, host_bytes, beside)
    return Calibration(name_of(device), alone, contended, machine.zero_copy(), machine.modes())


def name_of(device: torch.device) -> str:
    """Device, threads and versions that a measurement depends on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    threads = f"{host_threads()} threads, {torch.get_num_threads()} of torch"
    return f"{name}, {threads}, torch {torch.__version__}"


def cache_file(device: torch.device) -> Path:
    """Where a device's calibration is kept."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    safe = "".join(c if c.isalnum() else "-" for c in name_of(device))
    return root / "aslora-meft" / f"calibration-{safe}.json"


def calibrated(device: torch.device, *, anew: bool = False) -> Calibration:
    """The kept calibration of a device, or a new one, which is kept where that can be.

    Args:
        anew: measure in any case.
    """
    path = cache_file(device)
    if not anew and (found := _read(path)) is not None and found.machine == name_of(device):
        return found
    found = measure(device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps({"version": _VERSION, **asdict(found)}, indent=1).encode())
    except OSError as error:
        logger.info("MEFT: the calibration of this machine cannot be kept (%s); it is measured in each process.", error)
    return found


def _read(path: Path) -> Calibration | None:
    try:
        data = json.loads(path.read_text())
        if data["version"] != _VERSION:
            return None
        alone, contended = Ceilings(**data["alone"]), Ceilings(**data["contended"])
        return Calibration(data["machine"], alone, contended, data["zero_copy"], data["modes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
