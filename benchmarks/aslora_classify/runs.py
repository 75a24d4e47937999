"""The runs of `benchmarks.aslora_classify`: which a settings file asks for, and making those that a rows file lacks."""

import concurrent.futures
import datetime
import json
import multiprocessing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

from benchmarks.aslora_classify.data import Splits, load_splits
from benchmarks.aslora_classify.methods import Method
from benchmarks.aslora_classify.training import Setup, Task, run_row
from benchmarks.common.environment import environment
from benchmarks.common.protocol import DIVERGED, REPORTED, Protocol, diverged, run_method
from benchmarks.common.rows import Rows


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
        self.settings, self.rows, self.data, self.device = settings, rows, data, device
        self.tokenizer = settings.setup.tokenizer()
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.pad = self.tokenizer.pad_token_id
        self._splits: dict[str, Splits] = {}

    def splits(self, folder: str) -> Splits:
        """A data set, read when it is first needed; enough for each task that uses it.

        Raises:
            DataError: it is not there, or not as it must be.
        """
        if folder not in self._splits:
            examples = max(task.examples for task in self.settings.tasks if task.folder == folder)
            setup = self.settings.setup
            self._splits[folder] = load_splits(
                self.data / folder, self.tokenizer, examples, setup.n_valid, setup.n_test, setup.max_tokens
            )
        return self._splits[folder]

    def once(self, task: Task, method: Method, rate: float, seed: int, split: str) -> dict:
        """The row of one run, found or new; one that diverged and was to be reported is kept as such."""
        key = {"task": task.name, "method": method.name, "seed": seed, "split": split, "learning_rate": rate}
        settings = asdict(self.settings.setup) | asdict(task) | method.settings | {"device": self.device}
        del settings["name"]
        found = self.rows.find(key, settings)
        if found is None and split == REPORTED:
            found = self.rows.find(key | {"split": DIVERGED}, settings)
        if found is not None:
            return found
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        splits = self.splits(task.folder)
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


def begin(settings: Path, out: Path, data: Path, device: str, threads: int) -> None:
    global _runs
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()  # it says of each run that the classifier is new
    transformers.logging.disable_progress_bar()
    _runs = Runs(read_settings(settings), Rows(out), data, device)


def run_job(task: Task, method: Method) -> str | None:
    return _runs.run(task, method)


def run_all(jobs: list[tuple[Task, Method]], processes: int, arguments: tuple) -> list[str]:
    """Run the jobs, some at once; what went wrong."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, context, begin, arguments) as pool:
        futures = [pool.submit(run_job, *job) for job in jobs]
        try:
            return [said for future in futures if (said := future.result()) is not None]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
