"""The result file of the 24 GB benchmark: one row a cell, the file replaced whole after each."""

import json
import os
import sys
from pathlib import Path

import torch

from benchmarks.card_24gb.plan import HOST_STRATEGIES, Cell
from benchmarks.card_24gb.report.targets import CARD_GIB, MEASURED
from benchmarks.card_24gb.steps import ratio_of_rounds
from benchmarks.card_24gb.worker import CAP_GIB, DRY, OOM
from benchmarks.kernel_bench.report import driver, installed
from meft.table.row_step import native_library
from peft_bridge import replace_file

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "torchao", "numpy", "aslora-meft")
KEY = ("model", "base", "batch", "length", "accumulation", "clip", "r", "contestant", "routing")


def environment(device: torch.device) -> dict[str, object]:
    """What the numbers depend on beside the cells; a package without metadata is named with no version."""
    found: dict[str, object] = {name: installed(name) for name in PACKAGES} | {"torch": torch.__version__}
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found |= {
        "python": sys.version.split()[0], "processor": processor, "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "host_gib": round(memory, 1),
        "native_row_update": native_library() is not None,
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")),
    }  # fmt: skip
    if device.type == "cuda":
        # Not by what would make a context, which takes room that workers then see in use.
        properties = torch.cuda.get_device_properties(device)
        total = properties.total_memory / 2**30
        found |= {
            "gpu": properties.name, "driver": driver(), "cuda": torch.version.cuda,
            "capability": [properties.major, properties.minor], "device_total_gib": round(total, 2),
            "allocator_cap_gib": min(CAP_GIB, round(total, 2)),
        }  # fmt: skip
    return found


class Rows:
    """Rows in a JSON file, each with the number of its environment and the name of the invocation it is of."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.held: dict[str, list[dict]] = {"environments": [], "rows": []}
        if path.exists():
            self.held = json.loads(path.read_text())

    @property
    def rows(self) -> list[dict]:
        return self.held["rows"]

    def find(self, cell: Cell) -> dict | None:
        """The row of a cell."""
        return next((row for row in self.rows if all(row[name] == cell.key[name] for name in KEY)), None)

    def done(self, cell: Cell) -> bool:
        """Whether a cell has a row that stands: errors and wrong results are tried again."""
        row = self.find(cell)
        return row is not None and row["status"].startswith((MEASURED, OOM, DRY, "not installed"))

    def add(self, row: dict, environment: dict, invocation: str) -> None:
        """Add a row, in place of that of the same cell."""
        if environment not in self.held["environments"]:
            self.held["environments"].append(environment)
        row = row | {"environment": self.held["environments"].index(environment), "invocation": invocation}
        others = [old for old in self.rows if any(old[name] != row[name] for name in KEY)]
        self.held["rows"] = [*others, json.loads(json.dumps(row, default=str))]
        self.write()

    def write(self) -> None:
        """Replace the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(row) for row in self.rows)
        text = f'{{"environments": {json.dumps(self.held["environments"])},\n"rows": [\n{lines}\n]}}\n'
        replace_file(self.path, text.encode())

    def compare(self, invocation: str) -> None:
        """Ratios of the rows of an invocation among each other; those of other invocations are not compared with.

        `of_null`: the speed as a share of that of the engine without transport; `times_peers`: how many times as fast
        as each peer that fits: one whose process has more than 24 GiB of the device in use does not.
        """
        mine = [row for row in self.rows if row["invocation"] == invocation and row["status"] == MEASURED]
        for row in mine:
            alike = [other for other in mine if all(other[name] == row[name] for name in KEY[:1] + KEY[2:6])]
            if row["contestant"] not in HOST_STRATEGIES:
                continue
            peers = {}
            for other in alike:
                same = other["base"] == row["base"] and other["r"] == row["r"]
                if other["contestant"] == "null" and same and other["routing"] == row["routing"]:
                    row["of_null"] = ratio_of_rounds(row, other)
                fits = other["device_gib"] <= CARD_GIB
                lora = other["contestant"] in ("lora", "qlora")
                if other["routing"] == "-" and fits and (same or lora):
                    peers[other["contestant"]] = ratio_of_rounds(row, other)
            row["times_peers"] = peers
        if mine:
            self.write()
