"""Time of picking neurons in host memory: the C++ pass beside the torch path, which made all picks before it.

    python -m benchmarks.meft_layer.host_picks            # r 6400, d 4096, bf16 keys, T 1, 64, 512; a minute or two
    python -m benchmarks.meft_layer.host_picks --quick    # few rounds; keeps no result
    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.meft_layer.host_picks    # a run of its own, in the same file

What is timed is what `host` does a layer: `router_topk` and `expert_topk`. The contestants run in turn within a round,
in a new order each round, and a ratio is the median of the rounds' ratios, with the quartiles. Time on the processor
(of all threads) is given beside time on the clock, which on a shared machine says more about the others. Gflop/s count
the products of the candidates' scores. A whole step of a layer with rows in place (float32, `meft_layer`) is timed
with either way of picking too. Nothing is reported unless the checks of the same run have passed: picks equal those of
float64 on integer-valued inputs; on Gaussian ones they differ only where scores are within a rounding.
"""

import argparse
import datetime
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor

from adapter_kernels import expert_topk, router_topk
from adapter_kernels.runtime.host_threads import VARIABLE
from adapter_kernels.topk import host_topk
from adapter_kernels.topk.host_topk import native_library
from benchmarks.common.environment import environment
from benchmarks.meft_layer import __main__ as whole_layer
from peft_bridge import replace_file

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "host_picks.json"
SIZE = (6400, 4096, 320, 8, 64)  # r, d, E, P, K
TOKENS = (1, 64, 512)
LIMIT = 10.0  # times as fast as the torch path on as many threads, with the most tokens
NATIVE, BEFORE = "C++", "torch path"

Pick = Callable[[], tuple[Tensor, Tensor, Tensor]]


def pick(x: Tensor, logits: Tensor, keys: Tensor, size: tuple[int, ...], impl: str | None) -> tuple[Tensor, ...]:
    """Ids, scores and dots."""
    _, _, E, P, K = size
    experts, factors = router_topk(logits, P, impl=impl)
    return expert_topk(x, keys, experts, factors, K, E=E, impl=impl)


def check(x: Tensor, logits: Tensor, keys: Tensor, size: tuple[int, ...]) -> dict[str, int | float]:
    """The C++ picks beside those of float64.

    Raises:
        SystemExit: they are wrong.
    """
    whole = [t.mul(2).round().clamp(-3, 3) for t in (x, logits, keys)]
    ours = pick(*whole, size, None)
    exact = pick(whole[0].double(), whole[1].double(), whole[2].double(), size, "torch")
    if not all(torch.equal(a.double(), b.double()) for a, b in zip(ours, exact, strict=True)):
        raise SystemExit("check failed, nothing is reported: picks of integer-valued inputs differ")
    ids, scores, _ = pick(x, logits, keys, size, None)
    wide, best, _ = pick(x.double(), logits.double(), keys.double(), size, "torch")
    differing, largest = 0, 0.0
    for t in range(len(x)):
        mine, theirs = ids[t][ids[t] >= 0], wide[t][wide[t] >= 0]
        differing += int((~torch.isin(mine, theirs)).sum())
        n = min(len(mine), len(theirs))
        largest = max(largest, float((scores[t, :n] - best[t, :n]).abs().max() / best[t, 0]))
    # The i-th best scores are as close as roundings: so is whatever was picked in another's place.
    if largest > 1e-5 or differing > ids.numel() // 1000:
        raise SystemExit(f"check failed, nothing is reported: {differing} picks differ, scores by {largest:.1e}")
    return {
        "picks": int((ids >= 0).sum()),
        "picks that float64 does not make (near ties)": differing,
        "largest difference of the i-th best scores / best score": largest,
    }


def contestants(x: Tensor, logits: Tensor, keys: Tensor, size: tuple[int, ...], most: int) -> dict[str, Pick]:
    """Each way on one thread and on `most`."""

    def run(impl: str | None, threads: int) -> Pick:
        def timed() -> tuple[Tensor, ...]:
            torch.set_num_threads(threads)
            os.environ[VARIABLE] = str(threads)
            return pick(x, logits, keys, size, impl)

        return timed

    ways = {NATIVE: None, BEFORE: "torch"}
    return {f"{name}, {n} threads": run(impl, n) for name, impl in ways.items() for n in dict.fromkeys((1, most))}


def measure(tokens: int, size: tuple[int, ...], rounds: int, most: int) -> dict[str, object]:
    """One row."""
    r, d, E, P, _ = size
    generator = torch.Generator().manual_seed(0)
    x, logits = torch.randn(tokens, d, generator=generator), torch.randn(tokens, E, generator=generator)
    keys = torch.randn(r, d, generator=generator).to(torch.bfloat16)
    checks = check(x, logits, keys, size)
    ways = contestants(x, logits, keys, size, most)
    clock: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    chance = random.Random(0)
    for _ in range(rounds):
        for name in chance.sample(list(ways), len(ways)):
            ways[name]()  # untimed: threads and cache are then its own doing
            start, spent = time.perf_counter(), time.process_time()
            ways[name]()
            clock[name].append(time.perf_counter() - start)
            processor[name].append(time.process_time() - spent)
    flops = 2 * tokens * P * (r // E) * d
    found: dict[str, object] = {"tokens": tokens, "rounds": rounds, "checks": checks}
    for name in ways:
        low, middle, high = quantiles(clock[name], n=4)
        found[name] = {
            "ms": {"fastest": 1e3 * min(clock[name]), "25 %": 1e3 * low, "median": 1e3 * middle, "75 %": 1e3 * high},
            "ms on the processor": {"fastest": 1e3 * min(processor[name]), "median": 1e3 * median(processor[name])},
            "Gflop/s": {"best": flops / min(clock[name]) / 1e9, "median": flops / middle / 1e9},
        }
    for n in dict.fromkeys((1, most)):
        ours, before = f"{NATIVE}, {n} threads", f"{BEFORE}, {n} threads"
        for what, times in (("", clock), (" on the processor", processor)):
            low, middle, high = quantiles([b / a for a, b in zip(times[ours], times[before], strict=True)], n=4)
            found[f"times as fast{what}, {n} threads"] = {"25 %": low, "median": middle, "75 %": high}
    return found


def in_place(tokens: int, r: int, rounds: int, threads: int) -> dict[str, object]:
    """Milliseconds of a step of a layer with rows in place, on inputs of either kind, with either way of picking."""
    torch.set_num_threads(threads)
    os.environ[VARIABLE] = str(threads)
    found: dict[str, object] = {"tokens": tokens, "r": r, "threads": threads, "rounds": rounds}
    for kind in ("zipf", "gaussian"):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)
        layer = whole_layer.sparse_layer(r)
        layer.requires_grad_(True)
        whole_layer.check(layer, whole_layer.inputs(kind, min(tokens, 64), generator))
        step = whole_layer.sparse_step(layer)
        seconds: dict[str, list[float]] = {NATIVE: [], BEFORE: []}
        forward: dict[str, list[float]] = {NATIVE: [], BEFORE: []}
        for i in range(rounds + 1):
            x = whole_layer.inputs(kind, tokens, generator)
            g = torch.randn(x.shape, generator=generator)
            for name in sorted(seconds, reverse=bool(i % 2)):
                kept = host_topk.native_library
                host_topk.native_library = kept if name == NATIVE else lambda: None  # type: ignore[assignment]
                spent = time.process_time()
                try:
                    times = step(x.detach(), g)
                finally:
                    host_topk.native_library = kept
                if i:
                    seconds[name].append(time.process_time() - spent)
                    forward[name].append(times[0])
        for what, times in (("forward", forward), ("step, on the processor", seconds)):
            low, middle, high = quantiles([b / a for a, b in zip(times[NATIVE], times[BEFORE], strict=True)], n=4)
            found[f"{kind}, {what}"] = {name: 1e3 * median(values) for name, values in times.items()} | {
                "times as fast": {"25 %": low, "median": middle, "75 %": high}
            }
    return found


def report(result: dict) -> str:
    """The rows of a run as text."""
    lines = []
    for row in result["in place"]:
        for name, of in row.items():
            if isinstance(of, dict):
                ratio = of["times as fast"]
                lines.append(
                    f"T {row['tokens']:>4}  in place, {name}: {of[NATIVE]:.2f} ms against {of[BEFORE]:.2f}, "
                    f"{ratio['median']:.2f} [{ratio['25 %']:.2f}, {ratio['75 %']:.2f}] times as fast"
                )
    for row in result["rows"]:
        for name, of in row.items():
            if isinstance(of, dict) and "ms" in of:
                lines.append(
                    f"T {row['tokens']:>4}  {name:<24} {of['ms']['median']:9.3f} ms (fastest {of['ms']['fastest']:.3f})"
                    f", on the processor {of['ms on the processor']['median']:.3f}"
                    f", {of['Gflop/s']['median']:.1f} Gflop/s (best {of['Gflop/s']['best']:.1f})"
                )
            elif name.startswith("times"):
                lines.append(f"T {row['tokens']:>4}  {name}: {of['median']:.2f} [{of['25 %']:.2f}, {of['75 %']:.2f}]")
    return "\n".join(lines)


def main(arguments: list[str] | None = None, size: tuple[int, ...] = SIZE, tokens: tuple[int, ...] = TOKENS) -> int:
    """Measure, print and keep the rows.

    Returns:
        The exit code: 1 where the row of the most tokens is below its limit.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds; nothing is kept")
    parser.add_argument("--rounds", type=int, default=40, help="rounds of one pick of each (default: 40)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="the most (default: 2)")
    parser.add_argument("--out", type=Path, default=RESULT, help="the result file")
    args = parser.parse_args(arguments)
    if native_library() is None:
        raise SystemExit("the C++ library was not built: there is nothing to compare")
    load = os.getloadavg() if hasattr(os, "getloadavg") else None
    rows = [measure(T, size, 4 if args.quick else args.rounds, args.threads) for T in tokens]
    layers = [in_place(T, size[0], 3 if args.quick else max(5, args.rounds // 3), args.threads) for T in tokens]
    waiting = os.environ.get("OMP_WAIT_POLICY", "not set")
    run = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "environment": environment() | {"threads": args.threads, "cores": os.cpu_count(), "OMP_WAIT_POLICY": waiting},
        "load": {"at the start": load, "at the end": os.getloadavg() if load else None},
        "settings": dict(zip(("r", "d", "E", "P", "K"), size, strict=True)) | {"keys": "bfloat16", "x": "float32"},
        "limit": LIMIT,
        "rows": rows,
        "in place": layers,
    }
    print(report(run))
    if not args.quick:
        runs = json.loads(args.out.read_text()) if args.out.exists() else {}
        replace_file(args.out, (json.dumps(runs | {f"OMP_WAIT_POLICY {waiting}": run}, indent=1) + "\n").encode())
    last = rows[-1][f"times as fast, {args.threads} threads"]
    return int(last["median"] < LIMIT)  # type: ignore[index]


if __name__ == "__main__":
    sys.exit(main())
