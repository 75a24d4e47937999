"""What a tier of hot rows on the device saves, on a recorded trace of routing.

    python -m benchmarks.hot_rows --trace TRACE.npz         # half an hour: what the result file has is not done again
    python -m benchmarks.hot_rows --trace ... --quick       # seconds: counts alone; keeps no result

The counts are of all layers of the trace, with the bytes of `retrieval="stream"`. The times are those of the real
engine with some layers of the trace, d 64, where copies take their bytes at the rate of a link, row updates take a
host's time, and the base model takes a card's; these stand to each other as on the card that is named. What the engine
itself does on this CPU comes on top. Nothing is measured on a GPU.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from benchmarks.common.environment import environment
from benchmarks.hot_rows.link import CARDS, D, seconds_of_steps
from benchmarks.hot_rows.replay import replay, trace_of
from peft_bridge import replace_file

RESULT = Path(__file__).resolve().parents[1] / "results" / "hot_rows.json"
SHARE, LAYERS, COMPUTING = 0.366, 4, 0.9  # seconds of a micro-batch
SHARES = (0.1, 0.2, 0.25, 0.3, SHARE, 0.45)
MOST = {"host-updated rows": 0.32, "row bytes": 0.46, "swaps": 0.02}  # with SHARE
FASTER, SLOWER = 1.6, 1.02  # at least so many times as fast, and at most so many times the time of 16 micro-batches
STEPS = {1: (20, 9), 16: (3, 1)}  # micro-batches -> steps, and those at the start that do not count


def counts(used: Tensor) -> dict[str, dict[str, float]]:
    """Share of rows with a place -> shares of what there is without."""
    return {str(share): replay(used, share, 4096).shares() for share in SHARES}


def runs() -> list[dict[str, Any]]:
    """What is timed, the rows that have to be reached first."""
    found = [
        {"card": card, "micro-batches": accumulation, "share": share}
        for accumulation in STEPS
        for card in CARDS
        for share in (0, SHARE)
    ]
    return found + [{"card": card, "micro-batches": 1, "share": s} for card in CARDS for s in SHARES if s != SHARE]


def seconds(used: Tensor, run: dict[str, Any]) -> list[float]:
    """Of each step that counts."""
    some = used[:: max(1, len(used) // LAYERS)][:LAYERS]
    layers, _, r = some.shape
    union = float(some.float().sum() / some.shape[1])
    host, inbound, outbound = CARDS[run["card"]]
    rates = (
        host * COMPUTING / (2 * union),
        (layers * r + union) * D * 4 / (inbound * COMPUTING),  # float32 here: 4 bytes a value
        2 * union * D * 4 / (outbound * COMPUTING),
    )
    accumulation = run["micro-batches"]
    steps, skipped = STEPS[accumulation]
    # Up to the middle of the last steps; rows have their places after the second choice.
    given = some[:, -steps - 4 : -4] if accumulation == 1 else some.repeat(1, 2, 1)[:, -steps * accumulation :]
    return seconds_of_steps(given, run["share"], COMPUTING, rates, accumulation)[skipped:]


def verdicts(result: dict[str, Any]) -> dict[str, bool]:
    """What is to be reached -> whether it is; without what was not timed yet."""
    found = {
        f"{name}, {SHARE} of the rows: at most {MOST[name]:.0%}": share <= MOST[name]
        for name, share in result["counts"][str(SHARE)].items()
    }
    times = {(row["card"], row["micro-batches"], row["share"]): row["median"] for row in result["rows"]}
    for card, accumulation in {key[:2]: None for key in times}:
        pair = [times.get((card, accumulation, share)) for share in (0, SHARE)]
        if None in pair:
            continue
        ratio = pair[0] / pair[1]
        if accumulation == 1:
            found[f"{card}-like: at least {FASTER} times as fast"] = ratio >= FASTER
        else:
            found[f"{card}-like, {accumulation} micro-batches: at most {SLOWER} times the time"] = 1 / ratio <= SLOWER
    return found


def main(argv: list[str] | None = None) -> int:
    """Replay, time what the result file does not have, print and keep the numbers.

    Returns:
        The exit code: 1 if a number misses what is to be reached.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True, help="which rows were used: an .npz with `used` and `r`")
    parser.add_argument("--quick", action="store_true", help="counts alone; keeps no result")
    args = parser.parse_args(argv)
    used = trace_of(args.trace)
    settings = {
        "trace": hashlib.sha256(args.trace.read_bytes()).hexdigest()[:16],
        "cards": CARDS,
        "computing": COMPUTING,
        "layers": LAYERS,
        "d": D,
        "steps": {str(n): steps for n, steps in STEPS.items()},
    }
    result: dict[str, Any] = {"command": "python -m benchmarks.hot_rows --trace TRACE", "settings": settings}
    result |= {"counts": counts(used), "rows": []}
    for share, found in result["counts"].items():
        print(f"{share} of the rows:", ", ".join(f"{name} {value:.1%}" for name, value in found.items()))
    if not args.quick:
        held = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        if held.get("settings") == json.loads(json.dumps(settings)):
            result["rows"] = held["rows"]
        for run in runs():
            row = next((row for row in result["rows"] if all(row[name] == value for name, value in run.items())), None)
            if row is None:
                times = seconds(used, run)
                row = run | {"median": median(times), "seconds": times, "environment": environment()}
                result["rows"].append(row)
                replace_file(RESULT, (json.dumps(result | {"reached": verdicts(result)}, indent=1) + "\n").encode())
            print(f"{run}: {row['median']:.2f} s a step", flush=True)
    reached = verdicts(result)
    for what, is_reached in reached.items():
        print(f"{'reached' if is_reached else 'MISSED'}: {what}")
    return 0 if all(reached.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
