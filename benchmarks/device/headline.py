"""Part "headline": the main rows of `card_24gb/`, torch's allocator capped to a 24 GB card, and their targets."""

import json
import sys
import time

from benchmarks.card_24gb import __main__ as bench_24gb
from benchmarks.card_24gb.report.targets import MET, MISSED, targets
from benchmarks.device.findings import UNMEASURED, arguments, say

CELLS = " (null|meft auto|meft stream|meft device-rows|meft host) | lora "
DRY_CELLS = "tiny-llama.*(null|meft auto|meft stream|meft host) 0.26| lora "
FEWEST_MINUTES = 0.9


def main() -> int:
    began = time.perf_counter()
    parser = arguments(__doc__)
    parser.add_argument("--checked", action="store_true", help="part engine has passed: no gate here")
    given = parser.parse_args()
    options = ["--out", str(given.out)]
    if given.rehearse:
        options += ["--dry-run", "--only", DRY_CELLS]
    else:
        minutes = min(9.0, max(FEWEST_MINUTES, (given.seconds - (time.perf_counter() - began) - 12) / 60))
        options += ["--quick", "--only", CELLS, "--minutes", f"{minutes:.2f}"] + ["--no-gate"] * given.checked
    code = bench_24gb.main(options)  # it measures in processes of their own
    print(f"bench_24gb ended with {code} after {time.perf_counter() - began:.0f} s", flush=True)
    found = sorted(given.out.glob("*24gb*.json"))
    rows = json.loads(found[0].read_text())["rows"] if found else []
    for row in rows:
        bad = row["status"].startswith(("wrong", "error"))
        say(bench_24gb.said(row), UNMEASURED if given.rehearse else row["status"], False if bad else None, row=row)
    if not rows:
        say("rows", f"none: bench_24gb ended with {code}", False)
    for target in targets([] if given.rehearse else rows):
        holds = {MET: True, MISSED: False}.get(target.verdict)
        sign = ">=" if target.at_least else "<="
        worst = (min if target.at_least else max)(target.found, default=None)
        measured = UNMEASURED if worst is None else f"{worst:.3g}{target.unit}, worst of {len(target.found)}"
        say(target.name, measured, holds, f"{sign} {target.limit:g}{target.unit}", found=target.found)
    return int(code != 0 or not rows)


if __name__ == "__main__":
    sys.exit(main())
