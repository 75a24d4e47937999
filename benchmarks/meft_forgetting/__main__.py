"""What SmolLM2-135M forgets while it learns facts: LoRA, a dense adapter, MEFT, and MEFT with `train_rows`.

    python -m benchmarks.meft_forgetting --data DIR            # all rows; a rerun goes on where it was stopped
    python -m benchmarks.meft_forgetting --data DIR --quick    # a few short rows, under 10 minutes on 2 cores
    python -m benchmarks.meft_forgetting --report              # only writes the page anew

DIR holds `nq_open/`, `wikitext2/` and `gsm8k/`. A run learns N answers of NQ-open by heart. Then it is asked for them,
and the loss on WikiText-2 and on the answers of GSM8K is compared with the model's before. `settings.json` says which
runs are made, `comparisons.json` what is compared; both were committed before the runs. `benchmarks/common/protocol.py`
and `benchmarks/common/comparisons.py` say how it is decided. `--settings FILE` takes another file in their form.
"""

import os
import re
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.aslora_quality.__main__ import RESULTS
from benchmarks.aslora_quality.tasks import DataError
from benchmarks.common.quality_arguments import parsed, quality_parser
from benchmarks.common.rows import Rows
from benchmarks.meft_forgetting import report
from benchmarks.meft_forgetting.runs import Runs, read_settings, run_all

HERE = Path(__file__).resolve().parent
SETTINGS, QUICK = HERE / "settings.json", HERE / "quick.json"
HOLDS = "nq_open/, wikitext2/ and gsm8k/"


def main() -> int:
    parser = quality_parser(__doc__, HOLDS)
    parser.set_defaults(threads=1)
    parser.add_argument("--processes", type=int, default=2, help="methods trained at once, with --threads each")
    parser.add_argument("--methods", default="", help="only methods whose name this pattern finds")
    parser.add_argument("--settings", type=Path, help="file in the form of settings.json")
    parser.add_argument("--out", type=Path, help="JSON file for the rows; the page is written beside it as .md")
    args = parsed(parser, HOLDS)
    path = args.settings.resolve() if args.settings else (QUICK if args.quick else SETTINGS)
    flags = {SETTINGS: "", QUICK: " --quick"}.get(path, f" --settings {path.name}")
    out = args.out or RESULTS / f"meft_forgetting{'' if path == SETTINGS else f'_{path.stem}'}.json"
    failures: list[str] = []
    try:
        settings = read_settings(path)
        report.text({"environments": [], "rows": []}, settings, flags)  # before anything is run
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"--settings {path}: {error!r}; see settings.json for the form.", file=sys.stderr)
        return 2
    if not args.report:
        methods = [method for method in settings.methods if re.search(args.methods, method.name)]
        try:
            Runs(settings, Rows(out), args.data, args.device)  # before any process is begun, which will need the data
        except DataError as error:
            print(error, file=sys.stderr)
            return 2
        failures = run_all(methods, args.processes, (path, out, args.data, args.device, args.threads))
    out.with_suffix(".md").write_text(report.text(Rows(out).read(), settings, flags), encoding="utf-8")
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
