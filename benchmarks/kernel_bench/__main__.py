"""The kernels on a CUDA device: first whether they are right, then how fast, beside what the machine and torch can do.

    make bench-kernels                                                   # into benchmarks/results; under 8 minutes
    PYTHONPATH=kernels python -m benchmarks.kernel_bench --out $OUT   # from the repository's root, nothing installed
    PYTHONPATH=kernels python -m benchmarks.kernel_bench --rehearse --out DIR   # without a GPU: see below

Needs torch, triton and, for the plot, matplotlib. An op that fails its check gets no time. In each round every
contestant runs once, in a new order, after a memset larger than the L2 cache; times are CUDA events, given as their
quantiles 0.2, 0.5 and 0.8, and a ratio is the median of the rounds' ratios. Each op has its part of the time limit, to
which what earlier ops left over is added; cases that did not fit are listed as not run. kernels_<gpu>.csv, .png (the
roofline) and .txt (what is printed) go to --out.

A rehearsal runs the whole script on toy shapes with the torch paths, on a CPU (with TRITON_INTERPRET=1: the kernels,
interpreted, on fewer shapes), each contestant twice and without a time limit. What it writes is named and marked as a
rehearsal and never goes to the results; no target is judged.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import torch

from benchmarks.kernel_bench.cases_adamw import adamw, gate_adamw
from benchmarks.kernel_bench.cases_ffn import gate_ffn, sparse
from benchmarks.kernel_bench.cases_rows import gate_rows, gather, scatter
from benchmarks.kernel_bench.cases_selection import gate_selection, neurons, routing, routing_and_union, union
from benchmarks.kernel_bench.inputs import FULL, TINY, TOY, Bench, Shapes
from benchmarks.kernel_bench.report import REHEARSAL, machine, replace, roofline, stem, table
from benchmarks.kernel_bench.run import Gate, Plan, beside_a_gemm, measure_ceilings, run_op
from benchmarks.kernel_bench.targets import OK, Row, choices, place, targets
from benchmarks.kernel_bench.timing import Clock

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MINUTES = 7.5  # of 8; the rest is for imports and the plot
# Each op's function, its gate, and its part of the time.
OPS: dict[str, tuple[Plan, Gate, float]] = {
    "gather_rows": (gather, gate_rows, 2.0),
    "scatter_rows": (scatter, gate_rows, 1.0),
    "sparse_ffn": (sparse, gate_ffn, 4.0),
    "expert_topk": (neurons, gate_selection, 1.5),
    "router_topk + row_union": (routing_and_union, gate_selection, 1.0),
    "router_topk": (routing, gate_selection, 0.5),
    "row_union": (union, gate_selection, 1.0),
    "row_adamw": (adamw, gate_adamw, 2.0),
}


def line(row: Row, rehearsal: bool) -> str:
    """One row as text; in a rehearsal without times, which mean nothing."""
    head = f"{row['op']}: {place(row)}: {row['contestant']}".replace(": : ", ": ")
    if row["status"] != OK:
        return f"{head}: {row['status']}"
    if rehearsal:
        return f"{head}: right"
    text = f"{head}: {row['ms_q50']:.4f} ms [{row['ms_q20']:.4f}, {row['ms_q80']:.4f}]"
    if row["op"] == "ceiling":
        return text + f", {row['rate'] / 1e9:.1f} {'Gflop' if row['flops'] else 'GB'}/s"  # type: ignore[operator]
    if row.get("of_ceiling") not in ("", None):
        text += f", {row['of_ceiling']:.2f} of {row['ceiling']}"
    if row.get("times_ours") not in (1.0, None):
        text += f", {row['times_ours']:.2f} times {'alone' if row['what'] == 'GEMM' else 'ours'}"
    return text + (", waited for the host" if isinstance(row["host_gaps"], float) and row["host_gaps"] > 0.5 else "")


def main(arguments: list[str] | None = None, shapes: Shapes | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the files (default: benchmarks/results)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"time limit (default: {MINUTES})")
    parser.add_argument("--only", nargs="+", choices=OPS, metavar="OP", help=f"some of: {', '.join(OPS)}")
    parser.add_argument("--rehearse", action="store_true", help="toy shapes on the CPU, into --out; measures nothing")
    args = parser.parse_args(arguments)
    began = time.perf_counter()
    if args.rehearse:
        out = args.out.resolve() if args.out else None
        if out is None or out == RESULTS or RESULTS in out.parents:
            parser.error("a rehearsal needs --out, and not in benchmarks/results")
    elif not torch.cuda.is_available():
        print("No CUDA device: nothing is measured here (--rehearse --out DIR runs the script on toy shapes).")
        return 2
    bench = prepare(args.rehearse, shapes)
    environment = machine(bench.device)
    printed: list[str] = [REHEARSAL if bench.rehearsal else f"{environment['gpu']}, torch {environment['torch']}"]
    print(printed[0])
    rows = measure_ceilings(bench)
    print("\n".join(line(row, bench.rehearsal) for row in rows), flush=True)
    passed: set[Gate] = set()
    chosen = [op for op in OPS if not args.only or op in args.only]
    start, whole, done = time.perf_counter(), sum(OPS[op][2] for op in chosen), 0.0
    for op in chosen:
        done += OPS[op][2]
        deadline = start + (60 * args.minutes - (start - began)) * done / whole
        found = run_op(bench, op, *OPS[op][:2], float("inf") if bench.rehearsal else deadline, passed)
        if op == "gather_rows":
            found += beside_a_gemm(bench)
        for row in found:
            print(line(row, bench.rehearsal), flush=True)
        rows += found
    capability = environment["capability"]
    if bench.rehearsal:
        printed.append("No target is judged in a rehearsal.")
    elif not args.only:
        judged = targets(rows, str(environment["gpu"]), capability if isinstance(capability, int) else None)
        printed += [target.line() for target in judged] + choices(rows)
    printed += [line(row, bench.rehearsal) for row in rows if row["status"] != OK]
    print("\n".join(printed[1:]))
    write(args.out or RESULTS, rows, bench, environment, printed, partial=bool(args.only) and args.out is None)
    return 1 if any(str(row["status"]).startswith(("wrong", "error")) for row in rows) else 0


def prepare(rehearse: bool, shapes: Shapes | None) -> Bench:
    """The device, shapes and implementation of a run."""
    if not rehearse:
        torch.backends.cuda.matmul.allow_tf32 = False  # fp32 products are what others are checked against
        device = torch.device("cuda", torch.cuda.current_device())
        return Bench(device, shapes or FULL, "triton", torch.bfloat16, Clock(device))
    device = torch.device("cpu")
    # The interpreter has no bf16 of its own, and is slow.
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return Bench(device, shapes or TINY, "triton", torch.float32, Clock(device))
    return Bench(device, shapes or TOY, "torch", torch.bfloat16, Clock(device))


def write(folder: Path, rows: list[Row], bench: Bench, environment: Row, printed: list[str], partial: bool) -> None:
    """The files; a partial run does not replace the results of a whole one."""
    if partial:
        print("Some ops only, and no --out: nothing is kept.")
        return
    name = stem(environment)
    replace(folder / f"{name}.csv", table(rows, environment))
    image = roofline(rows, bench.ceilings, environment)
    if image is None:
        print("No plot: matplotlib is not installed.")
    else:
        replace(folder / f"{name}.png", image)
    everything = [printed[0], *(line(row, bench.rehearsal) for row in rows), *printed[1:]]
    replace(folder / f"{name}.txt", ("\n".join(everything) + "\n").encode())
    print(f"{folder / name}.csv")


if __name__ == "__main__":
    sys.exit(main())
