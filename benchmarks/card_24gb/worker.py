"""One worker of the 24 GB benchmark: builds the contestants of a job and measures their cells in rotating order.

    PYTHONPATH=kernels python -m benchmarks.card_24gb.worker JOB.json

The job names cells that share a model; what comes out are lines `@begin KEY` and `@row ROW` on standard output. A cell
that does not fit into memory is a row that says so; the others go on if all of its memory came back, else the worker
ends and its parent starts another one for what is left.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from benchmarks.card_24gb.bound import bound_of
from benchmarks.card_24gb.contestants import NOTES, Contestant, free, make
from benchmarks.card_24gb.gate import WrongError, check_strategy
from benchmarks.card_24gb.models import MissingError
from benchmarks.card_24gb.plan import Cell, rotated
from benchmarks.card_24gb.steps import Block, Settings, measure_block
from meft.cost.calibration import calibrated
from meft.cost.step_time import Ceilings

CAP_GIB = 22.5
LEAK_BYTES = 64 << 20
MEASURED, OOM, OOM_HOST, DRY = "measured", "OOM", "OOM on the host", "dry run"
Emit = Callable[[str, dict], None]


@dataclass(frozen=True)
class Job:
    """What a worker does.

    Attributes:
        seconds: no block begins after them. turn: of the order of the contestants.
        gate: whether each strategy's training is checked before it is timed.
    """

    cells: tuple[Cell, ...]
    settings: Settings
    seconds: float
    turn: int = 0
    dry: bool = False
    gate: bool = True

    def write(self, path: Path) -> None:
        held = {
            "cells": [cell.key for cell in self.cells], "settings": vars(self.settings), "seconds": self.seconds,
            "turn": self.turn, "dry": self.dry, "gate": self.gate,
        }  # fmt: skip
        path.write_text(json.dumps(held))

    @classmethod
    def read(cls, path: Path) -> "Job":
        held = json.loads(path.read_text())
        cells = tuple(Cell(**key) for key in held["cells"])
        settings = Settings(**held["settings"])
        return cls(cells, settings, held["seconds"], held["turn"], held["dry"], held["gate"])


def cap_memory(device: torch.device) -> None:
    """Let torch's allocator have no more than a 24 GB card has for it."""
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP_GIB * 2**30 / total), device)


def failure(error: BaseException) -> str:
    """A row's status where nothing could be measured."""
    if isinstance(error, torch.OutOfMemoryError):
        return OOM
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return OOM_HOST
    if isinstance(error, WrongError):
        return f"wrong: {error}"
    if isinstance(error, MissingError):
        return str(error)
    first = next(iter(str(error).splitlines()), "")
    return f"error: {type(error).__name__}: {first[:200]}"


def row_of(
    cell: Cell, blocks: list[Block], contestant: Contestant, dry: bool, ceilings: Ceilings | None = None
) -> dict:
    """A row from the blocks that have been measured so far; of a dry run without what would mean something."""
    row: dict = {**cell.key, "status": DRY if dry else MEASURED, "values": contestant.values()}
    row |= {"strategy": contestant.strategy, "note": NOTES.get(cell.contestant, ""), "rounds": len(blocks)}
    row |= contestant.refused()
    row |= blocks[-1].counted
    timed = [ms for block in blocks for ms in block.ms]
    low, middle, high = torch.tensor(timed, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    ).tolist()  # fmt: skip
    tokens = cell.batch * cell.length * cell.accumulation
    measured = {
        "tokens_per_s": 1e3 * tokens / middle, "ms_q20": low, "ms_q50": middle, "ms_q80": high, "steps": len(timed),
        "ms_of_rounds": [median(block.ms) for block in blocks],
        "stall_ms": median(block.stall_ms for block in blocks), "host_ms": median(block.host_ms for block in blocks),
        "peak_gib": max(block.peak_gib for block in blocks), "first_peak_gib": blocks[0].first_peak_gib,
        "device_gib": max(block.device_gib for block in blocks), "host_gib": max(block.host_gib for block in blocks),
    }  # fmt: skip
    if ceilings is not None:
        config = contestant.model.peft_config["default"]
        measured["ceilings"] = asdict(ceilings)
        bound = bound_of(ceilings, cell, contestant.model.config, config, row)
        if bound is not None:
            measured |= {"bound_ms": 1e3 * bound.seconds, "bound_of_null": bound.share_of_compute}
    return row | (dict.fromkeys(measured) if dry else measured)


class Worker:
    """Measures the cells of a job."""

    def __init__(self, job: Job, device: torch.device, emit: Emit) -> None:
        self.job, self.device, self.emit = job, device, emit
        self.until = time.perf_counter() + job.seconds
        self.blocks: dict[Cell, list[Block]] = {}
        self.failed: dict[Cell, str] = {}
        self.slowest = 0.0  # seconds of a contestant's block
        self.ceilings: Ceilings | None = None

    def run(self) -> None:
        """Measure what the time allows."""
        names = list(dict.fromkeys(cell.contestant for cell in self.job.cells))
        if self.job.cells[0].family == "meft":
            self._calibrate()
            if self.job.gate:
                self._gate(names)
        owner = None
        for turn in range(self.job.settings.rounds):
            for name in self._order(names, turn):
                cells = [c for c in self.job.cells if c.contestant == name and c not in self.failed]
                if not cells or self._late():
                    continue
                if owner is None:
                    owner = self._built(cells)
                    if owner is None:
                        return
                if not self._visit(owner, name, cells):
                    return

    def _order(self, names: list[str], turn: int) -> list[str]:
        """Rotated; at first the yardstick leads, for without it the others tell less if the time runs out."""
        order = rotated(names, self.job.turn + turn)
        return order if turn else sorted(order, key=lambda name: name != "null")

    def _late(self) -> bool:
        return time.perf_counter() + self.slowest > self.until

    def _fail(self, cells: list[Cell], status: str) -> None:
        for cell in cells:
            self.failed[cell] = status
            self.emit("row", {**cell.key, "status": status})

    def _calibrate(self) -> None:
        """The machine's ceilings, which are kept as well, so that auto chooses by the same ones."""
        if self.device.type != "cuda":
            return
        try:
            self.ceilings = calibrated(self.device, anew=True).alone
        except Exception as error:  # then rows have no bound
            print(f"no ceilings: {failure(error)}", flush=True)
        free(self.device)

    def _gate(self, names: list[str]) -> None:
        for name in names:
            cells = [cell for cell in self.job.cells if cell.contestant == name]
            try:
                check_strategy(name, self.device)
            except Exception as error:  # nothing of it is timed
                found = failure(error)
                self._fail(cells, found if found.startswith("wrong") else f"wrong: check failed: {found}")
        free(self.device)

    def _built(self, cells: list[Cell]) -> Contestant | None:
        """None: nothing can be measured, and rows say so."""
        self.emit("begin", cells[0].key)
        try:
            owner = make(cells[0], self.device)
        except Exception as error:
            alike = [c for c in self.job.cells if c not in self.failed]
            self._fail(alike, failure(error))
            return None
        free(self.device)
        self.level = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
        return owner

    def _visit(self, owner: Contestant, name: str, cells: list[Cell]) -> bool:
        """All cells of a contestant, once; False where the worker is spoilt."""
        entered = False
        for cell in cells:
            if self._late():
                break
            self.emit("begin", cell.key)
            began, status = time.perf_counter(), ""
            try:
                if not entered:
                    owner.enter(name)
                    entered = True
                block = measure_block(owner, cell, self.job.settings, self.device, first=cell not in self.blocks)
                self.blocks.setdefault(cell, []).append(block)
                row = row_of(cell, self.blocks[cell], owner, self.job.dry, self.ceilings)
                self.emit("row", row | ({"gate": self.job.gate} if cell.family == "meft" else {}))
            except Exception as error:
                status = failure(error)  # the error itself would hold what it was working on
            self.slowest = max(self.slowest, time.perf_counter() - began)
            if status:
                self._fail([cell], status)
                if not self._recovered(owner, status):
                    return False
                entered = False
        if entered:
            owner.leave()
        return True

    def _recovered(self, owner: Contestant, status: str) -> bool:
        """Whether the others can go on after a failure."""
        if len({cell.family for cell in self.job.cells}) == 1 and self.job.cells[0].family != "meft":
            return False  # its one cell
        try:
            owner.leave()
        except Exception as error:
            print(f"after {status}: {failure(error)}", flush=True)
            return False
        if self.device.type != "cuda":
            return True
        left = torch.cuda.memory_allocated(self.device) - self.level
        print(f"after {status}: {left / 2**20:.0f} MiB did not come back", flush=True)
        return left < LEAK_BYTES


def print_line(kind: str, content: dict) -> None:
    """A line for the parent."""
    print(f"@{kind} {json.dumps(content)}", flush=True)


def main() -> int:
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    cap_memory(device)
    Worker(Job.read(Path(sys.argv[1])), device, print_line).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
