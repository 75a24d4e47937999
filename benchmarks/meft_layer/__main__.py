"""Time of one MEFT layer on the CPU beside a dense ReLU parallel adapter of the same r.

    python -m benchmarks.meft_layer            # d 4096, r 6400, and curves over T and r: 5 minutes
    python -m benchmarks.meft_layer --quick    # the two main rows alone, few rounds; keeps no result

Both adapters compute what they add to the FFN's output, its gradients, and one AdamW step: MEFT with its row-wise one,
the dense adapter with torch's fused one. Forward, backward and update are timed apart. The contestants run in turn in
a round; a ratio is the median of the rounds' ratios. Two inputs: Gaussian, where nearly all neurons are used, and
tokens drawn by Zipf's law (exponent 1) from 32,000 fixed random embeddings. Nothing is reported unless the checks of
the same run have passed.
"""

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from adapter_kernels.runtime.host_threads import VARIABLE
from benchmarks.common.environment import environment
from meft import MEFTConfig
from meft.layer import MEFTLayer
from meft.num_experts import default_num_experts
from meft.optim.table_steps import update_table
from meft.routing.reference import reference
from meft.table.row_step import StepRule
from peft_bridge import replace_file

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "meft_cpu.json"
D, PROBED, TOP_K, VOCABULARY = 4096, 8, 64, 32_000
MAIN = (6400, 512)  # r, T
TOKENS, NEURONS = (1, 16, 64, 256, 1024, 4096), (1024, 4096, 16384)
LIMITS = {"zipf": 3.0, "gaussian": 2.0}  # times as fast as the dense adapter, at MAIN
PHASES = ("forward", "backward", "update")
RULE = StepRule(lr=1e-4, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, decoupled=True)


class Nothing(nn.Module):
    """An FFN that gives zeros, so that only adapters are timed."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def sparse_layer(r: int) -> MEFTLayer:
    """A layer with published sizes (E the divisor of r next to 4 sqrt(r)) and random values."""
    config = MEFTConfig(r=r, experts_per_token=PROBED, top_k=TOP_K, init_weights=False)
    layer = MEFTLayer(Nothing(), D)
    layer.update_layer("default", config)
    layer.set_adapter(["default"])
    return layer


def inputs(kind: str, tokens: int, generator: torch.Generator) -> Tensor:
    """x [1, T, d]."""
    if kind == "gaussian":
        return torch.randn(1, tokens, D, generator=generator)
    # The embeddings of one run are the same for all its inputs; drawn ones alone are made.
    drawn = torch.multinomial(1 / torch.arange(1, VOCABULARY + 1.0), tokens, replacement=True, generator=generator)
    distinct, place = drawn.unique(return_inverse=True)
    rows = [torch.randn(D, generator=torch.Generator().manual_seed(int(token))) for token in distinct]
    return torch.stack(rows)[place][None]


Step = Callable[[Tensor, Tensor], tuple[float, float, float]]


def sparse_step(layer: MEFTLayer) -> Step:
    """One step of the MEFT layer; returns the seconds of its phases."""
    tables, router = layer.tables("default"), layer.router("default")
    holder = torch.optim.AdamW([table.rows for table in tables])  # has the moments; the rows are stepped below
    optimizer = torch.optim.AdamW([router], lr=RULE.lr, weight_decay=RULE.weight_decay, fused=True)

    def step(x: Tensor, g: Tensor) -> tuple[float, float, float]:
        x = x.requires_grad_()
        start = time.perf_counter()
        y = layer(x)
        computed = time.perf_counter()
        y.backward(g)
        differentiated = time.perf_counter()
        for table in tables:
            gradient, table.rows.grad = table.rows.grad, None
            update_table(table, table.moments_in(holder), gradient, RULE)  # type: ignore[arg-type]
        optimizer.step()
        end = time.perf_counter()
        x.grad = router.grad = None
        return computed - start, differentiated - computed, end - differentiated

    return step


def dense_step(r: int) -> Step:
    """One step of the dense adapter."""
    up, down = nn.Parameter(torch.randn(r, D) * 0.02), nn.Parameter(torch.randn(D, r) * 0.02)
    optimizer = torch.optim.AdamW([up, down], lr=RULE.lr, weight_decay=RULE.weight_decay, fused=True)

    def step(x: Tensor, g: Tensor) -> tuple[float, float, float]:
        x = x.requires_grad_()
        start = time.perf_counter()
        y = (x @ up.T).relu() @ down.T
        computed = time.perf_counter()
        y.backward(g)
        differentiated = time.perf_counter()
        optimizer.step()
        end = time.perf_counter()
        optimizer.zero_grad()
        x.grad = None
        return computed - start, differentiated - computed, end - differentiated

    return step


def check(layer: MEFTLayer, x: Tensor) -> float:
    """The layer's output beside the float64 reference with the same picks: largest difference over largest value.

    Raises:
        SystemExit: it is too large, or the picks differ where scores are not close.
    """
    config = layer.configs["default"]
    keys, values = (table.rows.detach().double() for table in layer.tables("default"))
    router = layer.router("default").detach().double()
    with torch.no_grad():
        ours = layer(x)[0].double()
        theirs = reference(x[0].double(), router, keys, values, experts_per_token=config.probed, top_k=config.top_k)
    # A token whose picks differ by a rounding of its scores differs by one neuron: told apart by the size of it.
    error = (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
    others = error > 1e-5
    if int(others.sum()) > max(1, len(error) // 100) or float(error.max()) > 0.5:
        raise SystemExit(f"check failed, nothing is reported: {int(others.sum())} of {len(error)} tokens differ")
    return float(error[~others].max())


def measure(kind: str, r: int, tokens: int, rounds: int) -> dict[str, object]:
    """One row: both contestants in turn, on new inputs each round."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    layer = sparse_layer(r)
    layer.requires_grad_(True)
    error = check(layer, inputs(kind, min(tokens, 256), generator))
    steps = {"meft": sparse_step(layer), "dense": dense_step(r)}
    seconds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in steps}
    for i in range(rounds + 1):
        x = inputs(kind, tokens, generator)
        g = torch.randn(x.shape, generator=generator)
        if i == 1:  # after a warm-up, which also makes the moments
            layer.traffic["default"].forwards = layer.traffic["default"].union_rows = 0
        for name in sorted(steps, reverse=bool(i % 2)):
            times = steps[name](x.detach(), g)
            if i:
                seconds[name].append(times)
    traffic = layer.traffic["default"]
    totals = {name: [sum(times) for times in seconds[name]] for name in steps}
    ratios = sorted(dense / ours for dense, ours in zip(totals["dense"], totals["meft"], strict=True))
    return {
        "input": kind,
        "r": r,
        "experts": default_num_experts(r),
        "tokens": tokens,
        "|U| / r": round(traffic.union_rows / traffic.forwards / r, 3),
        "times as fast": round(median(ratios), 2),
        "lowest and highest round": [round(ratios[0], 2), round(ratios[-1], 2)],
        "rounds": rounds,
        "milliseconds": {
            name: {phase: round(1e3 * median(t[i] for t in seconds[name]), 2) for i, phase in enumerate(PHASES)}
            for name in steps
        },
        "largest relative error": error,
    }


def is_main(row: dict) -> bool:
    """Whether the row has a limit."""
    return (row["r"], row["tokens"]) == MAIN


def line(row: dict) -> str:
    """One row as text."""
    ours, dense = ("/".join(f"{row['milliseconds'][name][p]:.0f}" for p in PHASES) for name in ("meft", "dense"))
    mark = ""
    if is_main(row) and row["times as fast"] < LIMITS[row["input"]]:
        mark = f"  BELOW {LIMITS[row['input']]}x"
    return (
        f"{row['input']:<9} r {row['r']:>5}  T {row['tokens']:>4}  |U|/r {row['|U| / r']:.2f}  "
        f"{row['times as fast']:>6.2f}x  forward/backward/update ms: {ours} against {dense}{mark}"
    )


def main() -> int:
    """Measure, print and keep the rows.

    Returns:
        The exit code: 1 where a main row is below its limit.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the two main rows, few rounds; keeps no result")
    parser.add_argument("--out", type=Path, default=RESULT, help="file of the result")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))
    os.environ.setdefault(VARIABLE, str(torch.get_num_threads()))  # both contestants on as many
    began = time.perf_counter()
    plan = [(kind, *MAIN) for kind in ("zipf", "gaussian")]
    if not args.quick:
        plan += [(kind, MAIN[0], tokens) for kind in ("zipf", "gaussian") for tokens in TOKENS]
        plan += [(kind, r, MAIN[1]) for kind in ("zipf", "gaussian") for r in NEURONS]
    rows = []
    for kind, r, tokens in plan:
        main_row = (r, tokens) == MAIN
        rounds = (3 if args.quick else 15) if main_row else max(3, min(7, 6000 // tokens))
        rows.append(measure(kind, r, tokens, rounds))
        print(line(rows[-1]), flush=True)
    missed = any(is_main(row) and row["times as fast"] < LIMITS[row["input"]] for row in rows)
    if args.quick:
        return int(missed)
    result = {
        "command": "python -m benchmarks.meft_layer",
        "date": datetime.date.today().isoformat(),
        "seconds": round(time.perf_counter() - began),
        "environment": environment(),
        "limits": LIMITS,
        "rows": rows,
    }
    replace_file(args.out, (json.dumps(result, indent=1) + "\n").encode())
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
