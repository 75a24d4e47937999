"""Training steps of a contestant, timed and counted."""

import re
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.card_24gb.contestants import Contestant
from benchmarks.card_24gb.gate import WrongError
from benchmarks.card_24gb.plan import Cell
from benchmarks.card_24gb.routing import Routing, forced_picks
from benchmarks.card_24gb.traffic import ELEMENT, expected_bytes, growing_bytes

COUNTERS = ("forwards", "union_rows", "bytes_to_device", "bytes_to_host", "stall_ms", "host_ms", "ring_stalls")


@dataclass(frozen=True)
class Settings:
    """How long a block is.

    Attributes:
        seconds: of timed steps, beyond the fewest.
        warm: steps before them, one more in a contestant's first block of a cell.
        trace: folder for a profile of one more step of each block; None: no profile.
    """

    rounds: int = 2
    seconds: float = 2.5
    fewest: int = 3
    most: int = 12
    warm: int = 1
    trace: str | None = None


@dataclass(frozen=True)
class Block:
    """Some steps in a row of one contestant.

    Attributes:
        ms: of each step, from the end of the one before, so that updates that run on beside the next step are in it.
        counted: columns that do not depend on time. first_peak_gib: of the steps that are not timed.
    """

    ms: list[float]
    stall_ms: float
    host_ms: float
    peak_gib: float
    first_peak_gib: float
    device_gib: float
    host_gib: float
    counted: dict


def resident_gib() -> float:
    """Host memory that this process has in use."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    line = next((line for line in status.read_text().splitlines() if line.startswith("VmRSS")), "VmRSS: 0")
    return int(line.split()[1]) / 2**20


def train_step(contestant: Contestant, batches: list[Tensor], clip: bool, look: bool = False) -> tuple[list, dict]:
    """One optimizer step.

    Args:
        look: note how many rows the step updates, for which it waits.

    Returns:
        the micro-batches' losses, and what was noted.
    """
    losses, noted = [], {}
    accelerator = Accelerator(gradient_accumulation_steps=len(batches))  # tells which micro-batch is the last
    for ids in batches:
        with accelerator.accumulate(contestant.model):
            loss = contestant.model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)  # a share of it
        losses.append(loss.detach())
    if clip:
        torch.nn.utils.clip_grad_norm_(contestant.parameters(), 1.0)
    if look:
        noted["stepped_share"] = contestant.stepped_rows()
    contestant.optimizer.step()
    contestant.optimizer.zero_grad()
    return losses, noted


def write_trace(contestant: Contestant, cell: Cell, batches: list[Tensor], folder: str, cuda: bool) -> None:
    """Profile one step, for a trace viewer."""
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities) as profile:
        train_step(contestant, batches, cell.clip)
        if cuda:
            torch.cuda.synchronize()
    profile.export_chrome_trace(str(Path(folder) / f"24gb_trace_{re.sub('[^a-z0-9.]+', '_', cell.title())}.json.gz"))


def counters(contestant: Contestant) -> dict[str, float]:
    """Sums over the layers."""
    return {name: sum(getattr(t, name) for t in contestant.traffic) for name in COUNTERS}


def measure_block(contestant: Contestant, cell: Cell, settings: Settings, device: torch.device, first: bool) -> Block:
    """Warm up, then time steps.

    Raises:
        WrongError: a loss is not finite, or |U| is not the forced one.
    """
    cuda = device.type == "cuda"
    vocabulary = contestant.model.config.vocab_size
    chance = torch.Generator().manual_seed(0)
    batches = [
        torch.randint(vocabulary, (cell.batch, cell.length), generator=chance).to(device)
        for _ in range(cell.accumulation)
    ]
    with ExitStack() as stack:
        if cell.routing != "-":
            routing, layers = Routing(cell.routing), contestant.layers
            ids = routing.ids(cell.r, layers, cell.batch, cell.length)
            config = contestant.model.peft_config["default"]
            T = cell.batch * cell.length
            stack.enter_context(forced_picks(ids, routing.calls(layers), T, config.top_k))
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        noted: dict = {}
        losses = []
        for _ in range(settings.warm + first):
            found, noted = train_step(contestant, batches, cell.clip, look=True)
            losses += found
        if cuda:
            torch.cuda.synchronize(device)
        first_peak = torch.cuda.max_memory_allocated(device) / 2**30 if cuda else float("nan")
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        before, ms, host = counters(contestant), [], resident_gib()
        began = last = time.perf_counter()
        fewest = settings.fewest if cell.accumulation == 1 else min(2, settings.fewest)
        while len(ms) < fewest or (len(ms) < settings.most and last - began < settings.seconds):
            found, _ = train_step(contestant, batches, cell.clip)
            losses += found
            if cuda:
                torch.cuda.synchronize(device)
            now = time.perf_counter()
            ms.append(1e3 * (now - last))
            host = max(host, resident_gib())
            last = time.perf_counter()
        peak, in_use = float("nan"), float("nan")
        if cuda:
            peak = torch.cuda.max_memory_allocated(device) / 2**30
            spare, total = torch.cuda.mem_get_info(device)
            in_use = (total - spare) / 2**30
        if settings.trace is not None:
            write_trace(contestant, cell, batches, settings.trace, cuda)
    values = torch.stack(losses).float()
    if not bool(values.isfinite().all()):
        raise WrongError("a loss is not finite")
    after = counters(contestant)
    moved = {name: (after[name] - before[name]) / len(ms) for name in COUNTERS}
    counted = {"loss": round(float(values[-1]), 4)}
    if contestant.traffic:
        counted |= _counted(contestant, cell, moved, noted)
    return Block(ms, moved["stall_ms"], moved["host_ms"], peak, first_peak, in_use, host, counted)


def _counted(contestant: Contestant, cell: Cell, moved: dict[str, float], noted: dict) -> dict:
    """The columns of MEFT's counters, a step.

    Raises:
        WrongError: |U| is not the forced one.
    """
    size, union = Routing(cell.routing).size(cell.r), moved["union_rows"] / moved["forwards"]
    reached = size is not None and size <= cell.batch * cell.length * contestant.model.peft_config["default"].top_k
    if reached and abs(union - size) > 1e-6:
        raise WrongError(f"|U| is {union:g} and not {size}")
    config, model = contestant.model.peft_config["default"], contestant.model.config
    expected = expected_bytes(
        contestant.strategy, cell, d=model.hidden_size, layers=contestant.layers, experts=config.experts,
        top_k=config.top_k, union=union, stepped=noted.get("stepped_share"),
        refetch=contestant.refetches,
    )  # fmt: skip
    return {
        "union_share": round(union / cell.r, 4),
        "stepped_share": noted.get("stepped_share"),
        "bytes_to_device": round(moved["bytes_to_device"]),
        "bytes_to_host": round(moved["bytes_to_host"]),
        "elements_to_device": round(moved["bytes_to_device"] / ELEMENT),
        "elements_to_host": round(moved["bytes_to_host"] / ELEMENT),
        "formula_to_device": expected and round(expected[0]),
        "formula_to_host": expected and round(expected[1]),
        "ring_stalls": moved["ring_stalls"],
        "refetch": contestant.refetches,
        "row_values": 2 * contestant.layers * model.hidden_size * cell.r,
        "growing_gib": growing_bytes(contestant.strategy, cell.r, model.hidden_size, contestant.layers, config.experts)
        / 2**30,
    }


def ratio_of_rounds(ours: dict, other: dict) -> float | None:
    """How many times as fast ours is as the other: the median over the rounds that both ran."""
    pairs = list(zip(ours.get("ms_of_rounds") or [], other.get("ms_of_rounds") or [], strict=False))
    return median(theirs / mine for mine, theirs in pairs) if pairs else None
