"""A 7B model on one 24 GB card: MEFT by each strategy, the same engine without transport, and every other way.

    python -m benchmarks.card_24gb                       # on a CUDA machine; a rerun goes on where it was stopped
    python -m benchmarks.card_24gb --quick               # the main shape at two |U| / r, one round; under 10 minutes
    python -m benchmarks.card_24gb --no-gate             # training was checked just before: see `device_check.py`
    python -m benchmarks.card_24gb --only 'r 6400.*stream'   # some cells; the yardstick of each is measured with it
    python -m benchmarks.card_24gb --dry-run --out DIR   # everything, on tiny shapes on the CPU; measures nothing

From a checkout, with nothing installed but torch, triton, transformers and peft (bitsandbytes and torchao add rows):

    g++ -std=c++17 -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math -pthread -shared -fPIC \
        meft/table/row_adamw.cpp -o meft/table/_row_adamw.so    # the host's row update, else by torch operations
    g++ (the same) \
        kernels/adapter_kernels/topk/host_topk.cpp -o kernels/adapter_kernels/topk/_host_topk.so    # the host's picks
    PYTHONPATH=kernels python -m benchmarks.card_24gb --out $OUT

Llama-2-7B and Mistral-7B shapes with random frozen weights; torch's allocator is capped at 22.5 GiB. |U| / r is forced,
or drawn from a recording (`card_24gb/routing.py`). A strategy whose training differs from that of rows that are read
in place gets no speed. Strategies and the engine without transport run in one process and in rotating order, peers in
processes of their own beside them; ratios are of one invocation. What does not fit is a row that says OOM. Each row is
kept when it is there: FOLDER/24gb_GPU.json, with a table (.md) and a plot (.png).
"""

import argparse
import datetime
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.card_24gb.contestants import missing
from benchmarks.card_24gb.plan import Cell, Group, dry_plan, plan, quick_plan, rotated
from benchmarks.card_24gb.report import table as report
from benchmarks.card_24gb.report.rows import Rows, environment
from benchmarks.card_24gb.report.targets import times_bound, traffic_error
from benchmarks.card_24gb.steps import Settings
from benchmarks.card_24gb.worker import Emit, Job, Worker

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MINUTES = 8.3  # of 9: the rest is for what a worker is in the middle of, and for the plot
GRACE_S = 25.0  # after which a worker that is late is ended
REFUSALS = ("zero_copy_refused", "page_lock_refused")
FEWEST_S = 45.0  # a worker that starts with less would measure nothing
QUICK = Settings(rounds=1, seconds=1.5)
DRY = Settings(rounds=1, seconds=0.0, fewest=1, most=1, warm=1)
Start = Callable[[Path], subprocess.Popen]


def start_worker(job: Path) -> subprocess.Popen:
    """A process for a job."""
    paths = [str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    asleep = {"OMP_WAIT_POLICY": "PASSIVE"}  # threads that wait awake take the cores of the others
    surroundings = asleep | os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "benchmarks.card_24gb.worker", str(job)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=surroundings)


def messages(job: Job, start: Start) -> Iterator[tuple[str, dict]]:
    """What a worker says; in the end ("ended", {"code": ...}). Other lines of its output are passed on."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        job.write(path)
        process = start(path)
        late = threading.Timer(job.seconds + GRACE_S, process.kill)
        late.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                kind, _, content = line.partition(" ")
                if kind in ("@begin", "@row"):
                    yield kind[1:], json.loads(content)
                else:
                    print(line, end="", flush=True)
            yield "ended", {"code": process.wait(), "late": not late.is_alive()}
        finally:
            late.cancel()
            if process.poll() is None:
                process.kill()
                process.wait()


def run_apart(job: Job, emit: Emit, until: float, start: Start = start_worker) -> None:
    """Run a job in processes of its own: when one ends before all cells have a row, another does those that lack one.

    A cell in which a process died without a word gets a row that says so.
    """
    left = list(job.cells)
    while left:
        seconds = until - time.perf_counter()
        if seconds < FEWEST_S:
            return
        begun, answered = None, set()
        for kind, content in messages(replace(job, cells=tuple(left), seconds=seconds), start):
            if kind == "begin":
                begun = Cell(**content)
            elif kind == "row":
                cell = Cell(**{name: content[name] for name in Cell.__dataclass_fields__})
                answered.add(cell)
                begun = None if begun == cell else begun
                emit("row", content)
            elif content["code"] and begun is not None:
                why = "was late and was ended" if content["late"] else f"ended with code {content['code']}"
                answered.add(begun)
                emit("row", {**begun.key, "status": f"error: the worker {why}"})
        if not answered:
            return  # nothing more is to be had: out of time, or it does not even start
        left = [cell for cell in left if cell not in answered]


def chosen(group: Group, rows: Rows, only: str, again: bool, fresh: set[Cell]) -> Group:
    """The cells of a group that are to be measured, and those that they are compared with, of this invocation too.

    Args:
        again: rows that are there are measured anew. fresh: cells that this invocation has measured.
    """
    wanted = [
        cell for cell in group.cells
        if re.search(only, cell.title()) and cell not in fresh and (again or not rows.done(cell))
    ]  # fmt: skip
    measured = {*wanted, *fresh}
    peers = any(cell.routing == "-" for cell in wanted)
    # Peers that come later are compared with auto at the first routing, which then is measured again.
    auto = [cell for cell in group.cells if cell.contestant == "meft auto"][: int(peers)]
    added = [cell for cell in auto if cell not in measured]
    routings = {cell.routing for cell in (*wanted, *added) if cell.family == "meft"}
    added += [
        cell for cell in group.cells if cell.contestant == "null" and cell.routing in routings and cell not in measured
    ]
    return Group((*wanted, *added))


def said(row: dict) -> str:
    """A row in one line: what was measured, beside its bound, and what the machine refused."""
    title = Cell(**{name: row[name] for name in Cell.__dataclass_fields__}).title()
    refused = "".join(f", {name.replace('_', ' ')}" for name in REFUSALS if row.get(name))
    if row.get("tokens_per_s") is None:
        return f"{title}: {row['status']}{refused}"
    said = f"{title}: {row['tokens_per_s']:.0f} tokens/s, peak {row['peak_gib']:.2f} GiB"
    if (times := times_bound(row)) is not None:
        said += f", {times:.2f} of its bound"
    if (error := traffic_error(row)) is not None:
        said += f", traffic {100 * error:.2f} % off"
    return said + f"{refused}, round {row['rounds']}" + ("" if row.get("gate", True) else ", not checked here")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the files (default: benchmarks/results)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"time limit, at most 9 (default: {MINUTES})")
    parser.add_argument("--quick", action="store_true", help="the main shape at |U| / r 0.26 and 0.6, one round")
    parser.add_argument("--full", action="store_true", help="after the plan, every combination of all settings")
    parser.add_argument("--only", default="", help="cells whose title this pattern finds")
    parser.add_argument("--redo", action="store_true", help="measure rows anew that are there")
    parser.add_argument("--no-gate", action="store_true", help="do not check how strategies train; rows say so")
    parser.add_argument("--trace", action="store_true", help="profile a step of each cell too, into --out; with --only")
    parser.add_argument("--report", action="store_true", help="only write table and plot, and judge the targets")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, into --out; measures nothing")
    args = parser.parse_args(arguments)
    out = (args.out or RESULTS).resolve()
    if args.dry_run and (out == RESULTS or RESULTS in out.parents):
        parser.error("a dry run needs --out, and not in benchmarks/results")
    if not 0 < args.minutes <= 9:
        parser.error("--minutes must be above 0 and at most 9")
    args.out = out
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    began = time.perf_counter()
    if not (torch.cuda.is_available() or args.dry_run or args.report):
        print("No CUDA device: nothing is measured here (--dry-run --out DIR runs everything on tiny shapes).")
        return 2
    cuda = torch.cuda.is_available() and not args.dry_run
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    surroundings = environment(device)
    name = re.sub(r"[^a-z0-9]+", "_", str(surroundings.get("gpu", "cpu")).lower()).strip("_")
    stem = "dry_run_24gb" if args.dry_run else f"24gb_{name}{'_quick' * args.quick}"
    rows = Rows(args.out / f"{stem}.json")
    groups = list(dry_plan() if args.dry_run else quick_plan() if args.quick else plan(args.full))
    settings = DRY if args.dry_run else QUICK if args.quick else Settings()
    settings = replace(settings, trace=str(args.out)) if args.trace else settings
    invocation = f"{datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')} {os.getpid()}"
    until = began + 60 * args.minutes
    fresh: set[Cell] = set()

    def keep(kind: str, content: dict) -> None:
        if kind == "row":
            fresh.add(Cell(**{key: content[key] for key in Cell.__dataclass_fields__}))
            rows.add(content, surroundings, invocation)
            print(said(content), flush=True)

    for number, group in enumerate(() if args.report else groups):
        jobs = chosen(group, rows, args.only, args.redo, fresh).jobs()
        for cells in rotated(jobs, number):
            absent = missing(cells[0])
            if absent is not None and not args.dry_run:  # it takes no process to say so
                for cell in cells:
                    keep("row", {**cell.key, "status": absent})
                continue
            job = Job(tuple(cells), settings, until - time.perf_counter(), number, args.dry_run, not args.no_gate)
            if args.dry_run:
                Worker(job, device, keep).run()
            else:
                run_apart(job, keep, until)
        rows.compare(invocation)
        if jobs and until - time.perf_counter() < FEWEST_S and not args.dry_run:
            print("Out of time: run the same command again, it goes on from here.")
            break
    report.write(rows.path, rows, groups, args.dry_run)
    planned = list(dict.fromkeys(itertools.chain.from_iterable(group.cells for group in groups)))
    print("\n".join(report.verdicts(rows, args.dry_run)))
    print(f"{sum(map(rows.done, planned))} of {len(planned)} planned rows are there: {rows.path.with_suffix('.md')}")
    return int(any(row["status"].startswith(("wrong", "error")) for row in rows.rows))


if __name__ == "__main__":
    sys.exit(main())
