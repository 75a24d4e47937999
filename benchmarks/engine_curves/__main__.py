"""Losses of a MEFT training by the engine beside those of plain torch: all layers of SmolLM2-135M, fifty steps.

    python -m benchmarks.engine_curves            # some 5 minutes on one core, 3 GiB of memory
    python -m benchmarks.engine_curves --quick    # three steps; keeps no result

Three runs in float32 from the same start over the same text: by the engine, whose copies are done by threads after
random delays; by the plain formula (`meft.routing.reference`, torch's AdamW over whole matrices) with the engine's
picks, which must give the same losses; and by the plain formula with its own picks, which drifts away where rounding
decides between two neurons. The model is the one that `make demo` downloads.
"""

import argparse
import datetime
import json
import logging
import os
import sys
import time
from pathlib import Path

import torch

from benchmarks.common.environment import environment
from peft_bridge import replace_file
from tests.support.engine_curves import SMALL, SMOL, differences, smol
from tests.support.thread_streams import ThreadStreams

RESULT = Path(__file__).resolve().parents[1] / "results" / "engine_curves.json"
LIMIT = 1e-5  # between the losses of the engine and those of the formula with its picks


def first_above(values: list[float], limit: float) -> int | None:
    """Index of the first value above a limit."""
    return next((i for i, value in enumerate(values) if value > limit), None)


def main() -> int:
    """Train three times, print and keep the losses.

    Returns:
        The exit code: 1 where the losses with the same picks differ by `LIMIT` or more.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--length", type=int, default=64, help="tokens of a step")
    parser.add_argument("--r", type=int, default=SMOL["r"], help="neurons of a layer, a multiple of 128")
    parser.add_argument("--strategy", default="stream", help="MEFTConfig.retrieval")
    parser.add_argument("--delay", type=float, default=1e-3, help="longest delay of a copy in seconds")
    parser.add_argument("--quick", action="store_true", help="three steps; keeps no result")
    parser.add_argument("--out", type=Path, default=RESULT, help="file of the result")
    args = parser.parse_args()
    if not SMALL.exists():
        raise SystemExit(f"{SMALL} is not there: `make demo` downloads it.")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))
    logging.basicConfig(format="%(message)s")
    logging.getLogger("engine_curves").setLevel(logging.INFO)
    steps = 3 if args.quick else args.steps
    sizes = SMOL | {"r": args.r, "layers_to_transform": None}
    began = time.perf_counter()
    engine, replayed, free = smol(steps, args.strategy, ThreadStreams(longest=args.delay), args.length, **sizes)
    seconds = time.perf_counter() - began
    same, own = differences(engine, replayed), differences(engine, free)
    for i, row in enumerate(zip(engine, replayed, free, strict=True)):
        print(f"step {i:>2}  engine {row[0]:.7f}  its picks {row[1]:.7f}  own picks {row[2]:.7f}")
    print(f"same picks: largest difference {max(same):.3g} (limit {LIMIT:g})")
    print(f"own picks: largest difference {max(own):.3g}, at the end {engine[-1] - free[-1]:.3g}")
    missed = max(same) >= LIMIT
    if not args.quick:
        result = {
            "command": " ".join(["python -m benchmarks.engine_curves", *sys.argv[1:]]),
            "date": datetime.date.today().isoformat(),
            "seconds": round(seconds),
            "environment": environment(),
            "settings": {
                "model": SMALL.name,
                "dtype": "float32",
                "text": "the start of Genesis, King James, as in `make demo`",
                "steps": steps,
                "tokens of a step": args.length,
                "retrieval": args.strategy,
                "longest delay of a copy, seconds": args.delay,
                **sizes,
                "layers_to_transform": "all",
                "optimizer": "AdamW lr 1e-3, weight decay 0.01, gradients clipped to 1.0",
            },
            "limit": LIMIT,
            "same picks": {"largest difference": max(same), "step": same.index(max(same))},
            "own picks": {
                "largest difference": max(own),
                "step": own.index(max(own)),
                "at the end": engine[-1] - free[-1],
                "first step above the limit": first_above(own, LIMIT),
            },
            "losses": {"engine": engine, "same picks": replayed, "own picks": free},
        }
        replace_file(args.out, (json.dumps(result, indent=1) + "\n").encode())
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
