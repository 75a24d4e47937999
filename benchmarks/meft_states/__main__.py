"""Does MEFT learn as well with narrower masters and moments? The loss of facts, paired with float32.

    python -m benchmarks.meft_states --data DIR            # 64 runs, 90 minutes of CPU; a rerun goes on
    python -m benchmarks.meft_states --data DIR --quick    # two seeds of a few steps each
    python -m benchmarks.meft_states --report              # only writes the table anew

DIR holds `nq_open/`. Each way trains the same pairs in the same batches from the same start, with seeds that no other
page uses. The learning rate is one for all, below the one that recalls most: at that one losses end near zero, and
their ratios say nothing. A way is equal to float32 where the 95 % interval of the relative difference of the last
pass's loss lies inside of 2 %, different where p < 0.05 after Holm's correction for all ways, and else undecided.
"""

import re
import sys
from pathlib import Path
from statistics import mean

import torch

from adapter_kernels.adamw.moment_layout import MODES
from benchmarks.common.data_files import rows_of
from benchmarks.common.paired_test import LEVEL, PairedT, holm, paired_t
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


def tests(losses: dict[str, Losses]) -> dict[str, tuple[PairedT, float]]:
    """Of each way with two seeds: the test of its losses relative to those of float32, and its corrected p."""
    exact = losses.get(WAYS[0].name, {})
    found: dict[str, PairedT] = {}
    for way in WAYS[1:]:
        own = losses.get(way.name, {})
        paired = [own[seed] / exact[seed] - 1 for seed in sorted(own.keys() & exact.keys())]
        if len(paired) > 1:
            found[way.name] = paired_t(paired)
    absent = [1.0] * (len(WAYS) - 1 - len(found))
    corrected = holm([test.p for test in found.values()] + absent)
    return {name: (test, p) for (name, test), p in zip(found.items(), corrected, strict=False)}


def verdict(test: PairedT, p: float) -> str:
    """The word for a difference; `p` is corrected."""
    if test.low > -EQUAL and test.high < EQUAL:
        return "equal"
    return "different" if p < LEVEL else "undecided"


def text(rows: list[dict], task: Recall, quick: bool) -> str:
    """The page in markdown."""
    losses: dict[str, Losses] = {}
    recalls: dict[str, list[float]] = {}
    for row in rows:
        if row["task"] == task.name and row["split"] == "test":
            losses.setdefault(row["method"], {})[row["seed"]] = row["train_loss"]
            recalls.setdefault(row["method"], []).append(row["exact_match"])
    tested = tests(losses)
    lines = [
        "# MEFT with narrower masters and moments" + ", quick run: it decides nothing" * quick,
        "",
        "Written by `python -m benchmarks.meft_states` from the JSON file of the same name.",
        "",
        f"N = {task.n_pairs}: {task.steps} steps of {task.batch_size} pairs, r 1024, learning rate {RATE:g}. The loss",
        "is that of the last pass; the difference is relative to float32 masters and moments with the same seed, with",
        f"its 95 % interval. It is equal inside of {100 * EQUAL:g} %, different where p < {LEVEL} in a paired t test",
        f"after Holm's correction for {len(WAYS) - 1} comparisons, and else undecided.",
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
        if way.name in tested:
            test, p = tested[way.name]
            cells[4:] = [f"{100 * test.mean:+.2f} ± {50 * (test.high - test.low):.2f}", verdict(test, p)]
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
