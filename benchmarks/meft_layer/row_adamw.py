"""Time of one AdamW step on scattered rows of a table in host memory: ours beside torch's optimizers.

    python -m benchmarks.meft_layer.row_adamw           # 2048 of 6144 rows of 4096, float32; under 2 minutes on 2 cores
    python -m benchmarks.meft_layer.row_adamw --quick   # few rounds; keeps no result

All contestants run in turn within a round, in a new order each round, so that what else the machine does falls on all
alike; a ratio is the median of the rounds' ratios, with a bootstrap interval. A bandwidth counts what a step must move:
it reads the row, its moments and its gradient and writes all but the gradient back, 28 bytes a value. Nothing is
reported unless the checks of the same run have passed.
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

from adapter_kernels.runtime.host_threads import VARIABLE
from benchmarks.common.environment import environment
from meft.table.moments import Moments
from meft.table.row_step import RowState, StepRule, native_library, update_rows
from peft_bridge import replace_file

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "row_adamw.json"
SIZE = (6144, 2048, 4096)  # rows of the table, touched rows, values of a row
BYTES = 28  # a value and step: 4 read, 3 written, of 4 bytes
CPP, OWN_TORCH, FUSED, SPARSE, WHOLE = "C++", "torch path", "fused, contiguous rows", "SparseAdam", "fused, whole table"
BANDWIDTH_LIMIT, SPARSE_LIMIT = 0.8, 20.0  # of FUSED's bandwidth; times as fast as SPARSE
RULE = StepRule(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, decoupled=True)
ADAMW = {"lr": RULE.lr, "betas": (RULE.beta1, RULE.beta2), "eps": RULE.eps, "weight_decay": RULE.weight_decay}


def require(condition: bool, what: str) -> None:
    """A check that must pass before any time is reported."""
    if not condition:
        raise SystemExit(f"check failed, nothing is reported: {what}")


def state_of(table: Tensor) -> RowState:
    return Moments.fresh(table).row_state(table.clone())


def optimizer_step(kind: type[torch.optim.Optimizer], tensor: Tensor, grad: Tensor, **settings) -> Callable[[], object]:
    """The step of one of torch's optimizers over a tensor, with its state made."""
    parameter = torch.nn.Parameter(tensor)
    parameter.grad = grad
    optimizer = kind([parameter], **settings)
    optimizer.step()
    return optimizer.step


def check(table: Tensor, rows: Tensor, grads: Tensor) -> dict[str, float | bool]:
    """Three steps of either path on the rows beside torch's fused AdamW on a contiguous copy of them."""
    parameter = torch.nn.Parameter(table[rows])
    optimizer = torch.optim.AdamW([parameter], fused=True, **ADAMW)
    states = {path: state_of(table) for path in ((True, False) if native_library() else (False,))}
    for scale in (1.0, -0.5, 2.0):
        parameter.grad = grads * scale
        optimizer.step()
        for path, state in states.items():
            update_rows(state, rows, grads * scale, RULE, native=path)
    others = torch.ones(len(table), dtype=torch.bool).index_fill_(0, rows, False)
    for state in states.values():
        require(torch.equal(state.table[others], table[others]), "a row that was not touched has changed")
    difference = max((state.table[rows] - parameter.detach()).abs().max().item() for state in states.values())
    largest = table.abs().max().item()
    require(difference <= 1e-6 * largest, f"the rows differ from torch's by {difference:.2e}, the largest is {largest}")
    tensors = [state.tensors() for state in states.values()]
    equal = all(torch.equal(a, b) for a, b in zip(tensors[0], tensors[-1], strict=True))
    require(equal, "the C++ library and the torch path differ")
    return {"largest difference from torch / largest value": difference / largest, "paths are bit-equal": equal}


def contestants(table: Tensor, rows: Tensor, grads: Tensor) -> dict[str, Callable[[], object]]:
    """One step of each, over its own tensors."""
    r, d = table.shape
    steps: dict[str, Callable[[], object]] = {}
    for name, path in ((CPP, True), (OWN_TORCH, False)):
        if path is False or native_library():
            state = state_of(table)
            steps[name] = lambda state=state, path=path: update_rows(state, rows, grads, RULE, native=path)
    # The same bytes, in as many rows at the start of a table of the same size.
    steps[FUSED] = optimizer_step(torch.optim.AdamW, table.clone()[: len(rows)], grads, fused=True, **ADAMW)
    sparse = torch.sparse_coo_tensor(rows[None], grads, (r, d), is_coalesced=True, check_invariants=False)
    own = {"lr": RULE.lr, "betas": ADAMW["betas"], "eps": RULE.eps}
    steps[SPARSE] = optimizer_step(torch.optim.SparseAdam, table.clone(), sparse, **own)
    whole = torch.zeros(r, d).index_copy_(0, rows, grads)
    steps[WHOLE] = optimizer_step(torch.optim.AdamW, table.clone(), whole, fused=True, **ADAMW)
    return steps


def rounds_of(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant in each round; a new order each round, so that none always follows the same one.

    An untimed step goes before each timed one: where the threads and the cache are is then the contestant's own doing.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    chance = random.Random(0)
    for _ in range(rounds):
        for name in chance.sample(list(steps), len(steps)):
            steps[name]()
            start = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - start)
    return times


def interval(values: list[float]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the median."""
    resamples = 2000
    sample = torch.tensor(values, dtype=torch.float64)
    picks = torch.randint(len(values), (resamples, len(values)), generator=torch.Generator().manual_seed(0))
    found = sample[picks].quantile(0.5, dim=1).sort().values.tolist()
    return found[int(0.025 * resamples)], found[int(0.975 * resamples)]


def ratio(above: list[float], below: list[float]) -> dict[str, object]:
    """The rounds' ratios above / below: median and interval."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return {"median": median(ratios), "interval": interval(ratios)}


def measure(size: tuple[int, int, int], rounds: int) -> dict:
    """The whole result: checks, times, and ratios."""
    r, n, d = size
    generator = torch.Generator().manual_seed(0)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    surroundings = environment() | {"cores": os.cpu_count(), "load at the start": load}
    table, grads = torch.randn(r, d, generator=generator), torch.randn(n, d, generator=generator)
    rows = torch.randperm(r, generator=generator)[:n].sort().values
    checks = check(table, rows, grads)
    times = rounds_of(contestants(table, rows, grads), rounds)
    values = {name: (r if name == WHOLE else n) * d for name in times}
    table_rows = {}
    for name, seconds in times.items():
        low, middle, high = quantiles(seconds, n=4)
        spread = {"fastest": min(seconds), "25 %": low, "median": middle, "75 %": high}
        rate = BYTES * values[name] / middle / 1e9
        table_rows[name] = {"ms": {key: 1e3 * value for key, value in spread.items()}, "GB/s": rate}
    ours = CPP if CPP in times else OWN_TORCH
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "environment": surroundings,
        "settings": {"rows": r, "touched rows": n, "values of a row": d, "dtype": "float32", "rounds": rounds},
        "checks": checks,
        "steps": table_rows,
        "ours": ours,
        "bandwidth beside fused on contiguous rows": ratio(times[FUSED], times[ours]),
        "times as fast as SparseAdam": ratio(times[SPARSE], times[ours]),
        "times as fast as fused on the whole table": ratio(times[WHOLE], times[ours]),
        "C++ times as fast as the torch path": ratio(times[OWN_TORCH], times[ours]),
    }


def report(result: dict) -> tuple[str, bool]:
    """The result as text, and whether both limits are kept."""
    lines = [f"{'one step':<24} {'median ms':>10} {'fastest':>8} {'GB/s':>6}"]
    for name, row in result["steps"].items():
        lines.append(f"{name:<24} {row['ms']['median']:10.2f} {row['ms']['fastest']:8.2f} {row['GB/s']:6.1f}")
    within = True
    for name, limit in (
        ("bandwidth beside fused on contiguous rows", BANDWIDTH_LIMIT),
        ("times as fast as SparseAdam", SPARSE_LIMIT),
    ):
        found = result[name]
        low, high = found["interval"]
        kept = found["median"] >= limit
        within &= kept
        said = f"{found['median']:.2f} [{low:.2f}, {high:.2f}], limit {limit:g}: {'kept' if kept else 'NOT kept'}"
        lines.append(f"{result['ours']}, {name}: {said}")
    return "\n".join(lines), within


def main(arguments: list[str] | None = None, size: tuple[int, int, int] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds; nothing is kept")
    parser.add_argument("--rounds", type=int, default=40, help="rounds of one step of each (default: 40)")
    parser.add_argument("--out", type=Path, default=RESULT, help="the result file")
    args = parser.parse_args(arguments)
    os.environ.setdefault(VARIABLE, str(torch.get_num_threads()))  # all contestants on as many
    result = measure(size or SIZE, 5 if args.quick else args.rounds)
    text, within = report(result)
    print(text)
    if not args.quick:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(args.out, (json.dumps(result, indent=1) + "\n").encode())
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
