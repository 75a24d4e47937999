"""MEFT beside LoRA and a dense adapter on facts to learn: does routing help, and does its rule for rows?

    python -m benchmarks.meft_facts --data DIR            # all rows; a rerun goes on where it was stopped
    python -m benchmarks.meft_facts --data DIR --quick    # a few short rows, under 10 minutes on 2 cores
    python -m benchmarks.meft_facts --report              # only writes the page anew

DIR holds `nq_open/`. A run trains SmolLM2-135M on question-answer pairs, with loss on the answers alone, and asks for
the same answers: the loss of an answer's tokens, and how often greedy generation writes the whole answer.
`settings.json` says which runs are made, `comparisons.json` what is compared; both were committed before the runs.
`benchmarks/common/protocol.py` and `benchmarks/common/comparisons.py` say how it is decided. With `--settings FILE`
another file takes the place of `settings.json`: with a larger model, other methods, more facts.
"""

import os
import re
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.aslora_quality.tasks import DataError
from benchmarks.common.comparisons import read_list
from benchmarks.common.quality_arguments import parsed, quality_parser
from benchmarks.common.quality_page import Page
from benchmarks.common.rows import Rows
from benchmarks.common.runs import Settings, run_all
from benchmarks.meft_facts.training import read_settings, runs_of
from benchmarks.meft_recall.pairs import load_pairs

HERE = Path(__file__).resolve().parent
SETTINGS, QUICK = HERE / "settings.json", HERE / "quick.json"
LISTS = HERE / "comparisons.json", HERE / "quick_comparisons.json", HERE / "device_comparisons.json"
RESULTS = HERE.parent / "results"
HOLDS = "nq_open/"


def page(settings: Settings, path: Path) -> Page:
    """The page of a settings file."""
    flags = {SETTINGS: "", QUICK: " --quick"}.get(path, f" --settings {path.name}")
    return Page(
        "MEFT beside LoRA and a dense adapter: learning facts",
        "python -m benchmarks.meft_facts --data DIR" + flags,
        read_list(settings.comparisons),
        [task.name for task in settings.tasks],
        [method.name for method in settings.methods],
        settings.protocol,
        settings.comparisons.resolve() in LISTS,
        path == QUICK,
        "Validation data are the facts too, in the order of other seeds: memory is tried, and nothing else.",
    )


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
    out = args.out or RESULTS / f"meft_facts{ending}.json"
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
            tokenizer = settings.setup.base("cpu")[1]
            for task in settings.tasks:
                load_pairs(args.data, settings.setup.recall(task), tokenizer)  # before any process is begun
        except (DataError, OSError) as error:
            print(error, file=sys.stderr)
            return 2
        failures = run_all(jobs, args.processes, runs_of, (path, out, args.data, args.device), args.threads)
    out.with_suffix(".md").write_text(written.text(Rows(out).read()), encoding="utf-8")
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
