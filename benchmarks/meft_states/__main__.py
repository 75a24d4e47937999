"""Does MEFT learn as well with narrower masters and moments? The loss of facts, paired with float32.

    python -m benchmarks.meft_states --data DIR            # 64 runs, 90 minutes of CPU; a rerun goes on
    python -m benchmarks.meft_states --data DIR --quick    # two seeds of a few steps each
    python -m benchmarks.meft_states --report              # only writes the table anew

DIR holds `nq_open/`. Each way trains the same pairs in the same batches from the same start, with seeds that no other
page uses. The learning rate is one for all, below the one that recalls most: at that one losses end near zero, and
their ratios say nothing. A way is equal to float32 where the 95 % interval of the relative difference of the last
pass's loss lies inside of 2 %, different where it does not hold zero, and else undecided.
"""

import math
import re
import sys
from pathlib import Path
from statistics import mean, stdev

import torch

from adapter_kernels.adamw.moment_layout import MODES
from benchmarks.common.data_files import rows_of
from benchmarks.common.paired_test import LEVEL, t_quantile
from benchmarks.common.quality_arguments import DataError, out_of, parsed, quality_parser
from benchmarks.language.base_model import load_base
from benchmarks.language.facts import FILE, Recall, load_pairs
from benchmarks.meft_states.runs import RATE, Way, run_all

SEEDS = range(20, 28)
TASK, QUICK = Recall(64, 40), Recall(16, 16)
HOLDS = "nq_open/"
EQUAL = 0.02  # of the loss
WAYS = [Way(master, mode) for master in ("float32", "bfloat16") for mode in MODES]
Losses = dict[int, float]  # of each seed


def difference(ours: Losses, theirs: Losses) -> tuple[float, float]:
    """Mean of the relative differences of paired losses, and half of its 95 % interval."""
    found = [ours[seed] / theirs[seed] - 1 for seed in sorted(ours.keys() & theirs.keys())]
    if len(found) < 2:
        return mean(found), math.inf
    return mean(found), t_quantile(LEVEL, len(found) - 1) * stdev(found) / math.sqrt(len(found))


def verdict(middle: float, half: float) -> str:
    """The word for an interval."""
    if abs(middle) + half < EQUAL:
        return "equal"
    return "different" if abs(middle) > half else "undecided"


def text(rows: list[dict], task: Recall, quick: bool) -> str:
    """The page in markdown."""
    losses: dict[str, Losses] = {}
    recalls: dict[str, list[float]] = {}
    for row in rows:
        if row["task"] == task.name and row["split"] == "test":
            losses.setdefault(row["method"], {})[row["seed"]] = row["train_loss"]
            recalls.setdefault(row["method"], []).append(row["exact_match"])
    exact = losses.get(WAYS[0].name, {})
    lines = [
        "# MEFT with narrower masters and moments" + ", quick run: it decides nothing" * quick,
        "",
        "Written by `python -m benchmarks.meft_states` from the JSON file of the same name.",
        "",
        f"N = {task.n_pairs}: {task.steps} steps of {task.batch_size} pairs, r 1024, learning rate {RATE:g}. The loss",
        "is that of the last pass; the difference is relative to float32 masters and moments with the same seed, with",
        f"its 95 % interval. It is equal inside of {100 * EQUAL:g} %, different where the interval does not hold zero.",
        "",
        "| masters and moments | seeds | loss | recall, % | difference, % | |",
        "|---|---|---|---|---|---|",
    ]
    for way in WAYS:
        own = losses.get(way.name, {})
        if not own:
            lines.append(f"| {way.name} | missing | | | | |")
            continue
        cells = [way.name, str(len(own)), f"{mean(own.values()):.4f}", f"{100 * mean(recalls[way.name]):.1f}", "", ""]
        if way is not WAYS[0] and own.keys() & exact.keys():
            middle, half = difference(own, exact)
            cells[4:] = [f"{100 * middle:+.2f} ± {100 * half:.2f}", verdict(middle, half)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = quality_parser(__doc__, HOLDS)
    parser.add_argument(
        "--methods", default="", help='beside float32 only ways whose name has this pattern, as "float8"'
    )
    args = parsed(parser, HOLDS)
    task, seeds = (QUICK, SEEDS[:2]) if args.quick else (TASK, SEEDS)
    rows = rows_of(out_of(args, "meft_states"), args.data, [FILE])
    if not args.report:
        torch.set_num_threads(args.threads)
        try:
            pairs = load_pairs(args.data, task, load_base("cpu")[1])
        except DataError as error:
            print(error, file=sys.stderr)
            return 2
        ways = [way for way in WAYS if way is WAYS[0] or re.search(args.methods, way.name)]
        run_all(rows, ways, seeds, task, pairs, args.device)
    path: Path = rows.path.with_suffix(".md")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text(rows.read()["rows"], task, args.quick), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
