"""How MEFT's router spreads its load over a long run, with and without the balance loss.

    python -m benchmarks.meft_routing --data DIR                 # 300 steps, 6 runs; a rerun goes on where it stopped
    python -m benchmarks.meft_routing --data DIR --quick         # two runs of 10 steps, a minute
    python -m benchmarks.meft_routing --data DIR --steps 1000 --device cuda
    python -m benchmarks.meft_routing --report                   # only writes the page anew

DIR holds `wikitext2/`. SmolLM2-135M learns the text of WikiText-2 with MEFT, never the same window twice: AdamW without
weight decay, clipping at 1, a rate that rises for 10 % of the steps and falls linearly. Ten times in a run it is noted
how evenly the picks fall on the experts, which experts were never picked, and how many neurons a micro-batch uses.
"""

import datetime
import sys
from pathlib import Path

import torch

from benchmarks.common.data_files import rows_of
from benchmarks.common.environment import environment
from benchmarks.common.places import SMOLLM2
from benchmarks.common.quality_arguments import DataError, out_of, parsed, quality_parser
from benchmarks.meft_routing import report
from benchmarks.meft_routing.runs import FILES, RATE, Setup, load_texts, run

SEEDS = (0, 1, 2)
BALANCE = 0.01  # of arXiv 2101.03961
ARMS = {"without balance loss": 0.0, f"balance loss {BALANCE:g}": BALANCE}
HOLDS = "wikitext2/"


def page(content: dict, quick: bool) -> str:
    """Of a rows file's content, in markdown."""
    return report.text(content, list(ARMS), SEEDS[:1] if quick else SEEDS, quick=quick)


def main() -> int:
    parser = quality_parser(__doc__, HOLDS)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--r", type=int, default=1024)
    parser.add_argument("--model", type=Path, default=SMOLLM2, help="folder of another model than SmolLM2-135M")
    parser.add_argument("--out", type=Path, help="JSON file for the rows; the page is written beside it as .md")
    args = parsed(parser, HOLDS)
    seeds = SEEDS[:1] if args.quick else SEEDS
    setup = Setup(10 if args.quick else args.steps, args.r, model=args.model)
    rows = rows_of(args.out or out_of(args, "meft_routing"), args.data, FILES)
    if not args.report:
        torch.set_num_threads(args.threads)
        try:
            texts = load_texts(args.data, setup)
        except DataError as error:
            print(error, file=sys.stderr)
            return 2
        for seed in seeds:  # pairs are whole as early as can be
            for name, balance in ARMS.items():
                key = {"task": setup.name, "method": name, "seed": seed, "split": "test", "learning_rate": RATE}
                settings = setup.settings() | {"router_aux_loss_coef": balance, "device": args.device}
                if rows.find(key, settings) is not None:
                    continue
                date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
                result = run(setup, texts, balance, seed, args.device)
                row = rows.add(key | {"settings": settings, "date": date} | result, environment(args.device))
                print(date, *key.values(), f"{row['seconds']} s ({row['cpu_seconds']} CPU s)", flush=True)
    rows.path.with_suffix(".md").write_text(page(rows.read(), args.quick), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
