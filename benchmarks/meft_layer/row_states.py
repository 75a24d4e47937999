"""Bytes and time of one AdamW step on rows in host memory, for each way to keep masters and moments.

    python -m benchmarks.meft_layer.row_states           # 2048 of 6144 rows of 4096; 2 minutes on 2 cores, 0.7 GiB
    python -m benchmarks.meft_layer.row_states --quick   # few rounds; keeps no result

Gradients are bfloat16, as they come from a bfloat16 model; sums of several micro-batches are float32, 2 bytes more.
Bytes are counted in a build of the C++ update that adds up its loads and stores; what it reads a second time, from the
cache, is not counted. All ways run in turn within a round, in a new order each round; a ratio is the median of the
rounds' ratios to float32 masters and moments, with a bootstrap interval. Values a second of processor time are those of
a core, whatever else the machine does; on one thread, and on as many as there are cores. Nothing is reported unless the
C++ update and the torch operations that replace it have given the same bits.
"""

import argparse
import ctypes
import datetime
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import meft.table.row_step
from adapter_kernels.adamw.moment_layout import MODES, moment_bytes
from adapter_kernels.runtime.host_threads import VARIABLE
from benchmarks.common.environment import environment
from benchmarks.meft_layer.row_adamw import ROOT, RULE, interval, require
from meft.table.moments import Moments
from meft.table.row_step import RowState, declare, native_library, update_rows
from peft_bridge import replace_file

RESULT = ROOT / "benchmarks" / "results" / "row_states.json"
SIZE = (6144, 2048, 4096)  # rows of the table, touched rows, values of a row
WAYS = [(master, mode) for master in (torch.float32, torch.bfloat16) for mode in MODES]
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-pthread", "-shared", "-fPIC", "-DCOUNT_BYTES"]


def named(master: torch.dtype, mode: str) -> str:
    return f"{str(master).removeprefix('torch.')} masters, moments {mode}"


def state_of(way: tuple[torch.dtype, str], r: int, d: int) -> RowState:
    """A fresh state with the copy that a bfloat16 model reads."""
    master, mode = way
    table = torch.randn(r, d, generator=torch.Generator().manual_seed(1)).to(master)
    copy = table.to(torch.bfloat16) if master == torch.float32 else None
    return Moments.fresh(table, mode).row_state(table, copy)


def check(d: int) -> None:
    """Steps of either path on a few rows."""
    for way in WAYS:
        states = [state_of(way, 6, d) for _ in range(2)]
        for step in range(3):
            grads = torch.randn(3, d, generator=torch.Generator().manual_seed(step)).to(torch.bfloat16)
            for state, native in zip(states, (True, False), strict=True):
                update_rows(state, torch.tensor([0, 2, 5]), grads, RULE, seed=3, native=native)
        pairs = zip(*(state.tensors() for state in states), strict=True)
        require(all(torch.equal(a, b) for a, b in pairs), f"the C++ library and the torch path differ: {named(*way)}")


def counted_bytes(d: int) -> dict[str, float] | None:
    """Bytes that an update moves for each value; None where there is no compiler."""
    compiler = shutil.which((sysconfig.get_config_var("CXX") or "c++").split()[0]) or shutil.which("g++")
    if compiler is None:
        return None
    source = Path(meft.table.row_step.__file__).with_name("row_adamw.cpp")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "counting.so"
        subprocess.run([compiler, *FLAGS, str(source), "-o", str(built)], check=True)
        library = ctypes.CDLL(str(built))
    declare(library)
    library.meft_bytes_counted.restype = ctypes.c_int64
    own, found = meft.table.row_step.native_library, {}
    try:
        meft.table.row_step.native_library = lambda: library
        for way in WAYS:
            state = state_of(way, 4, d)
            library.meft_bytes_counted()
            update_rows(state, torch.tensor([1, 3]), torch.ones(2, d, dtype=torch.bfloat16), RULE, native=True)
            found[named(*way)] = library.meft_bytes_counted() / (2 * d)
    finally:
        meft.table.row_step.native_library = own
    return found


def timed(step: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the clock, and of the processor over all threads."""
    step()  # where the threads and the cache are is then the contestant's own doing
    clock, processor = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - clock, time.process_time() - processor


def measure(size: tuple[int, int, int], rounds: int, threads: int) -> dict[str, object]:
    """Values a second of each way, and its ratio to float32."""
    r, n, d = size
    os.environ[VARIABLE] = str(threads)
    chance = torch.Generator().manual_seed(0)
    grads = torch.randn(n, d, generator=chance).to(torch.bfloat16)
    rows = torch.randperm(r, generator=chance)[:n].sort().values
    states = {named(*way): state_of(way, r, d) for way in WAYS}

    def step_of(state: RowState, grads: Tensor = grads) -> Callable[[], object]:
        return lambda: update_rows(state, rows, grads, RULE, native=True)

    steps, order = {name: step_of(state) for name, state in states.items()}, random.Random(0)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name in order.sample(list(steps), len(steps)):
            seconds[name].append(timed(steps[name]))
    least, found = named(*WAYS[0]), {}
    for name, all_seconds in seconds.items():
        clock, processor = zip(*all_seconds, strict=True)
        found[name] = {
            "Gvalues/s of a core": n * d / median(processor) / 1e9,
            "Gvalues/s": n * d / median(clock) / 1e9,
            **{
                f"{what}, over float32": {"median": median(ratios), "interval": interval(ratios)}
                for what, part in (("rate of a core", 1), ("rate", 0))
                for ratios in [[b[part] / a[part] for a, b in zip(all_seconds, seconds[least], strict=True)]]
            },
        }
    return found


def main(arguments: list[str] | None = None, size: tuple[int, int, int] = SIZE) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds; nothing is kept")
    parser.add_argument("--rounds", type=int, default=30, help="rounds of one step of each way (default: 30)")
    parser.add_argument("--out", type=Path, default=RESULT, help="the result file")
    args = parser.parse_args(arguments)
    require(native_library() is not None, "the C++ library was not built at installation")
    r, n, d = size
    check(d)
    moved = counted_bytes(d)
    kept = {named(*w): w[0].itemsize + 2 * (w[0] == torch.float32) + moment_bytes(w[1], d) / d for w in WAYS}
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "environment": environment() | {"cores": os.cpu_count(), "load at the start": os.getloadavg()[0]},
        "settings": {"rows": r, "touched rows": n, "values of a row": d, "rounds": args.rounds},
        "bytes kept for a value": kept,
        "bytes moved by an update of a value": moved,
        "threads": {
            str(threads): measure(size, 3 if args.quick else args.rounds, threads)
            for threads in sorted({1, os.cpu_count() or 1})
        },
    }
    print(f"{'':<42}{'kept':>7}{'moved':>7}  Gvalues/s of a core, over float32 [95 %]")
    for threads, found in result["threads"].items():
        for name, row in found.items():
            ratio = row["rate of a core, over float32"]
            low, high = ratio["interval"]
            rate = f"{row['Gvalues/s of a core']:.2f}, {ratio['median']:.2f} [{low:.2f}, {high:.2f}]"
            size_moved = "" if moved is None else f"{moved[name]:.2f}"
            print(f"{name:<42}{kept[name]:>7.2f}{size_moved:>7}  {rate}, {threads} threads")
    if not args.quick:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(args.out, (json.dumps(result, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
