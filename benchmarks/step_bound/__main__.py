"""Predicts the step time of a 7B model with MEFT on 24 GB cards: `meft.cost.step_time`'s bound, nothing is measured.

    python -m benchmarks.step_bound            # all cells, into benchmarks/results/model_24gb.json and .md: a minute
    python -m benchmarks.step_bound --quick    # a few cells; keeps no result

Shape of Llama-2-7B (d 4096, 32 layers, FFN 11008, vocabulary 32,000) with a bf16 base. The ceilings are public
specifications and assumptions (`aslora_meft/planner/rates.json`), so every number is PREDICTED and a bound: no step
can be faster on a machine with these ceilings, real ones are slower. Speed relative to computing alone is that of a
null transport. |U| of an accumulated step is taken as the most it can be, accumulation times |U| up to r.
"""

import argparse
import datetime
import itertools
import json
import sys
from pathlib import Path

import torch

from aslora_meft.planner.rates import card, ceilings, rates
from meft import MEFTConfig
from meft.cost.memory import AdapterShape, Plan, Work
from meft.cost.step_time import BaseModel, step_time
from meft.retrieval.strategies import DEVICE_STRATEGIES
from peft_bridge import replace_file

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "model_24gb.json"
D, LAYERS, FFN, HEAD = 4096, 32, 3 * 4096 * 11008, 32_000 * 4096
CARDS = ("3090", "4090")
NEURONS = (3072, 6400, 8464)
MICRO_BATCHES = ((1, 256), (2, 256), (4, 256), (8, 256), (1, 2048))
SHARES = (0.1, 0.26, 0.6, 1.0)
ACCUMULATIONS = (1, 16)
QUICK = (("3090", 6400, (2, 256), 0.26, 1, True), ("4090", 6400, (2, 256), 0.26, 16, False))
MARK = "PREDICTED"


def plan_of(strategy: str, r: int, tokens: int, share: float, accumulation: int) -> Plan:
    """The plan of one cell."""
    shape = AdapterShape.of(MEFTConfig(r=r), d=D, layers=LAYERS, base_dtype=torch.bfloat16)
    return Plan(shape, Work(tokens, max(1, round(share * r)), accumulation), strategy)


def cell(
    name: str, r: int, micro_batch: tuple[int, int], share: float, accumulation: int, clipping: bool
) -> dict[str, object]:
    """One row: the bound of each strategy."""
    batch, length = micro_batch
    base = BaseModel(length, 4 * D * D, FFN, D, HEAD)
    found: dict[str, object] = {
        "kind": MARK, "card": card(name)["name"], "r": r, "micro-batch": f"{batch}x{length}", "|U|/r": share,
        "accumulation": accumulation, "clipping": clipping,
    }  # fmt: skip
    times = {
        strategy: step_time(
            plan_of(strategy, r, batch * length, share, accumulation), base, ceilings(name), clipping=clipping
        )
        for strategy in DEVICE_STRATEGIES
    }
    return found | {
        "seconds at least": {strategy: round(time.seconds, 4) for strategy, time in times.items()},
        "of computing alone": {strategy: round(time.share_of_compute, 3) for strategy, time in times.items()},
    }


def tokens_per_second(row: dict, strategy: str) -> float:
    """At most so many."""
    batch, length = map(int, row["micro-batch"].split("x"))
    return row["accumulation"] * batch * length / row["seconds at least"][strategy]


def line(row: dict) -> str:
    """One row as text."""
    each = "  ".join(
        f"{strategy} {seconds:.3f} s ({row['of computing alone'][strategy]:.0%})"
        for strategy, seconds in row["seconds at least"].items()
    )
    clipped = "clipped" if row["clipping"] else "no clip"
    return (
        f"{MARK} {row['card'].split()[-1]}  r {row['r']:>4}  {row['accumulation']:>2} x {row['micro-batch']:<6}  "
        f"|U|/r {row['|U|/r']:.2f}  {clipped}: {each}"
    )


def markdown(rows: list[dict]) -> str:
    """Tables of the rows with clipping, one a card and r; the JSON has all."""
    shares = " / ".join(f"{share:g}" for share in SHARES)
    host, link = rates()["host"], rates()["pcie_bytes_per_second"]["4.0 x16"]
    text = [
        "# Predicted step times of Llama-2-7B with MEFT on 24 GB cards",
        "",
        f"{MARK}, not measured: lower bounds of the seconds of an optimizer step (`python -m benchmarks.step_bound`), "
        "bf16 base, gradient checkpointing, clipping by the global norm, rows saved. Ceilings: GEMM and memory rates "
        f"of public specifications; PCIe {link['value'] / 1e9:.0f} GB/s each way ({link['source']}); host memory "
        f"{host['memory_bytes_per_second']['value'] / 1e9:.0f} GB/s ({host['memory_bytes_per_second']['source']}); "
        f"picking on the host {host['picking_flops']['value'] / 1e9:g} Gflop/s ({host['picking_flops']['source']}). "
        "`resident`, with its optimizer on the device, does not fit beside a bf16 base: it shows what moving costs.",
        "",
        "What the host moves in its memory is counted in the code (`meft/cost/host_bytes.py`): 36 bytes for each value "
        "that is stepped, clipped or not, and more for accumulated micro-batches; a CPU that reads a cache line before "
        "it writes it moves 42. "
        "Launches and Python are not counted.",
        "",
        f"Each cell: tokens/s at most, at |U|/r = {shares}.",
    ]
    clipped = [row for row in rows if row["clipping"]]
    for (name, r), group in itertools.groupby(clipped, key=lambda row: (row["card"], row["r"])):
        text += ["", f"## {name}, r {r}", "", f"| step | {' | '.join(DEVICE_STRATEGIES)} |", "|---" * 6 + "|"]
        for step, cells in itertools.groupby(group, key=lambda row: (row["accumulation"], row["micro-batch"])):
            listed = list(cells)
            columns = [
                " / ".join(f"{tokens_per_second(row, strategy):,.0f}" for row in listed)
                for strategy in DEVICE_STRATEGIES
            ]
            text.append(f"| {step[0]} x {step[1]} | {' | '.join(columns)} |")
    return "\n".join(text) + "\n"


def main() -> int:
    """Predict, print and keep the rows.

    Returns:
        The exit code, 0.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few cells; keeps no result")
    parser.add_argument("--out", type=Path, default=RESULT, help="file of the result; a .md is written beside it")
    args = parser.parse_args()
    # In the order of the tables: shares are one cell's.
    everything = (
        (name, r, micro_batch, share, accumulation, clipping)
        for name in CARDS
        for r in NEURONS
        for clipping in (True, False)
        for accumulation in ACCUMULATIONS
        for micro_batch in MICRO_BATCHES
        for share in SHARES
    )
    rows = []
    for settings in QUICK if args.quick else everything:
        rows.append(cell(*settings))
        print(line(rows[-1]), flush=True)
    if args.quick:
        return 0
    result = {
        "kind": f"{MARK}: bounds from ceilings, nothing was measured",
        "command": "python -m benchmarks.step_bound",
        "date": datetime.date.today().isoformat(),
        "model": {"d": D, "layers": LAYERS, "FFN weights a layer": FFN, "head weights": HEAD, "base": "bfloat16"},
        "ceilings": {name: vars(ceilings(name)) for name in CARDS},
        "rates": {"cards": {name: card(name) for name in CARDS}} | {k: v for k, v in rates().items() if k != "cards"},
    }
    lines = ",\n".join(json.dumps(row) for row in rows)  # one row a line
    text = json.dumps(result, indent=1).removesuffix("\n}") + f',\n "rows": [\n{lines}\n ]\n}}\n'
    replace_file(args.out, text.encode())
    replace_file(args.out.with_suffix(".md"), markdown(rows).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
