"""What a tier of hot rows on the device saves, on a recorded trace of routing.

    python -m benchmarks.hot_rows --trace TRACE.npz         # minutes
    python -m benchmarks.hot_rows --trace ... --quick       # seconds: counts alone

The counts are of all layers of the trace, with the bytes of `retrieval="stream"`. The times are those of the real
engine with some layers of the trace, d 64, where copies take their bytes at the rate of a link, row updates take a
host's time, and the base model takes a card's; these stand to each other as on the card that is named. What the engine
itself does on this CPU comes on top. Nothing is measured on a GPU.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median

from benchmarks.common.environment import environment
from benchmarks.hot_rows.link import CARDS, D, seconds_of_steps
from benchmarks.hot_rows.replay import replay, trace_of
from peft_bridge import replace_file

RESULT = Path(__file__).resolve().parents[1] / "results" / "hot_rows.json"
SHARE, LAYERS, COMPUTING = 0.366, 4, 0.9  # seconds of a micro-batch
MOST = {"host-updated rows": 0.32, "row bytes": 0.46, "swaps": 0.02}


def main() -> int:
    """Replay, print and keep the numbers.

    Returns:
        The exit code: 1 if a count is above what is to be reached.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True, help="which rows were used: an .npz with `used` and `r`")
    parser.add_argument("--quick", action="store_true", help="counts alone; keeps no result")
    args = parser.parse_args()
    used = trace_of(args.trace)
    shares = replay(used, SHARE, 4096).shares()
    for name, share in shares.items():
        print(f"{name}: {share:.1%} of those without a tier or of used rows (at most {MOST[name]:.0%})")
    reached = all(share <= MOST[name] for name, share in shares.items())
    if args.quick:
        return 0 if reached else 1
    some = used[:: max(1, len(used) // LAYERS)][:LAYERS]
    layers, _, r = some.shape
    union = float(some.float().sum() / some.shape[1])
    rows = []
    for card, (host, inbound, outbound) in CARDS.items():
        rates = (
            host * COMPUTING / (2 * union),
            (layers * r + union) * D * 4 / (inbound * COMPUTING),  # float32 here: 4 bytes a value
            2 * union * D * 4 / (outbound * COMPUTING),
        )
        for accumulation in (1, 16):
            found = {}
            # From the middle on; rows have their places after the second choice.
            steps = some[:, -24:-4] if accumulation == 1 else some.repeat(1, 2, 1)[:, -3 * accumulation :]
            for rows_there in (0, SHARE):
                times = seconds_of_steps(steps, rows_there, COMPUTING, rates, accumulation)
                found[rows_there] = median(times[9:] if accumulation == 1 else times[1:])
            rows.append({"card": card, "micro-batches": accumulation, "without": found[0], "with": found[SHARE]})
            print(
                f"{card}-like, {accumulation} micro-batches: {found[0]:.2f} s without, {found[SHARE]:.2f} s with: "
                f"{found[0] / found[SHARE]:.2f} times as fast; computing takes {COMPUTING * accumulation:.2f} s",
                flush=True,
            )
    result = {
        "command": "python -m benchmarks.hot_rows --trace TRACE",
        "share of rows with a place": SHARE,
        "counts": shares,
        "steps behind a simulated link": rows,
        "environment": environment(),
    }
    replace_file(RESULT, (json.dumps(result, indent=1) + "\n").encode())
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
