"""The runs of a benchmark of quality: which a settings file asks for, and making those that a rows file lacks."""

import concurrent.futures
import datetime
import json
import multiprocessing
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.common.environment import environment
from benchmarks.common.places import RESULTS
from benchmarks.common.protocol import DIVERGED, REPORTED, Protocol, diverged, run_method
from benchmarks.common.rows import Rows


@dataclass(frozen=True)
class Settings:
    """A settings file: what all runs share, the protocol, the tasks, the methods, and the list of comparisons.

    `setup`, `tasks` and `methods` are dataclasses of the benchmark. A task has a `name`; a method has a `name`, a
    `turn` and `settings`, on which its rows depend. `shares` are names of files in `results/`: of runs that these have
    already, the rows are taken over.
    """

    setup: Any
    protocol: Protocol
    tasks: list[Any]
    methods: list[Any]
    comparisons: Path
    shares: tuple[str, ...] = ()

    @property
    def jobs(self) -> list[tuple[Any, Any]]:
        """A method on a task each, in the order of what they tell: methods of the first turn on every task first."""
        turns = sorted({method.turn for method in self.methods})
        return [(task, one) for turn in turns for task in self.tasks for one in self.methods if one.turn == turn]


def read_settings(path: Path, setup: type, task: type, method: type) -> Settings:
    """Read a settings file.

    Args:
        setup, task, method: the benchmark's dataclasses.

    Raises:
        OSError: there is none.
        ValueError, KeyError, TypeError: it is not as the benchmark's settings.json is.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    of_setup = {name: content[name] for name in setup.__dataclass_fields__}
    return Settings(
        setup(**of_setup),
        Protocol(*(tuple(content[name]) for name in ("rates", "tuning_seeds", "seeds"))),
        [task(**one) for one in content["tasks"]],
        [method(**one) for one in content["methods"]],
        path.parent / content["comparisons"],
        tuple(content.get("shares", ())),
    )


def settings_of_row(settings: Settings, task: Any, method: Any, device: str) -> dict:
    """What a row depends on beside its learning rate and seed, as JSON has it.

    Raises:
        ValueError: two of setup, task and method have a field of one name, of which a row would keep one.
    """
    found: dict[str, Any] = {"device": device}
    for part in (asdict(settings.setup), asdict(task), method.settings):
        part = {name: value for name, value in part.items() if name != "name"}
        if shared := found.keys() & part.keys():
            raise ValueError(f"setup, task and method share the names {sorted(shared)}: give each field its own.")
        found |= part
    return json.loads(json.dumps(found))


def of_settings(content: dict, settings: Settings, device: str) -> dict:
    """A rows file's content without the rows that were made with other settings than a rerun would use.

    Of a method's reported rows on a task those have the learning rate of the last one made: where a rate was given up,
    or chosen anew, rows of the former are left until all have been made again.
    """
    wanted = {
        (task.name, method.name): settings_of_row(settings, task, method, device) for task, method in settings.jobs
    }
    kept = [row for row in content["rows"] if wanted.get((row["task"], row["method"])) == row["settings"]]
    newest = {(row["task"], row["method"]): row["learning_rate"] for row in kept if row["split"] == REPORTED}
    return content | {
        "rows": [
            row
            for row in kept
            if row["split"] != REPORTED or row["learning_rate"] == newest[row["task"], row["method"]]
        ]
    }


def cost(rows: list[dict]) -> str:
    """What the rows of a page took, and which were made for another page."""
    own = [row for row in rows if "made_for" not in row]
    hours = sum(row["cpu_seconds"] for row in own) / 3600
    said = f"{len(own)} runs, {hours:.1f} hours of CPU time in all."
    others = sorted({row["made_for"] for row in rows if "made_for" in row})
    return said + (f" {len(rows) - len(own)} further runs are those of {' and '.join(others)}." if others else "")


class Runs(ABC):
    """Makes the runs that a rows file lacks; a benchmark says what one run is (`result`)."""

    def __init__(self, settings: Settings, rows: Rows, data: Path, device: str) -> None:
        self.settings, self.rows, self.data, self.device = settings, rows, data, device

    @abstractmethod
    def result(self, task: Any, method: Any, rate: float, seed: int, split: str) -> dict:
        """Train and score: what is measured, with the metrics and `first_train_loss`, `last_train_loss`, `seconds`,
        `cpu_seconds`."""

    @abstractmethod
    def prepare(self, jobs: list[tuple[Any, Any]]) -> None:
        """Read what all processes will read.

        Raises:
            DataError: it is not there, or not as it must be.
        """

    def protocol_of(self, method: Any) -> Protocol:
        """How a method's rate is chosen, and which seeds are reported."""
        return self.settings.protocol

    def told(self, row: dict) -> str:
        """A row in words."""
        return f"accuracy {row['accuracy']:.3f} loss {row['loss']:.4f}" if row["loss"] is not None else "no number"

    def once(self, task: Any, method: Any, rate: float, seed: int, split: str) -> dict:
        """The row of one run, found or new; one that diverged and was to be reported is kept as such."""
        key = {"task": task.name, "method": method.name, "seed": seed, "split": split, "learning_rate": rate}
        settings = settings_of_row(self.settings, task, method, self.device)
        shared = [RESULTS / name for name in self.settings.shares]
        for held_as in (key, key | {"split": DIVERGED}) if split == REPORTED else (key,):
            found = self.rows.find(held_as, settings) or self.rows.take(held_as, settings, shared)
            if found is not None:
                return found
        stop_without_parent()
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        result = self.result(task, method, rate, seed, split)
        if split == REPORTED and diverged(result):
            key["split"] = DIVERGED
        row = self.rows.add(key | {"settings": settings, "date": date} | result, environment(self.device))
        print(date, *key.values(), self.told(row), f"{row['seconds']} s ({row['cpu_seconds']} CPU s)", flush=True)
        return row

    def run(self, task: Any, method: Any) -> str | None:
        """All runs of a method on a task; a sentence where the protocol finds no rate."""
        key = {"task": task.name, "method": method.name, "split": DIVERGED}
        settings = settings_of_row(self.settings, task, method, self.device)

        def ended(rate: float) -> bool:
            return self.rows.find(key | {"learning_rate": rate}, settings) is not None

        try:
            for _ in run_method(lambda *run: self.once(task, method, *run), self.protocol_of(method), ended):
                pass
        except RuntimeError as error:
            return f"{task.name}: {method.name}: {error}"
        return None


def stop_without_parent() -> None:
    """End a worker process whose parent was killed: it would go on, unseen, with what is queued."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise SystemExit("The program that began this process has ended.")


_runs: Runs  # of a worker process


def begin(make: Callable[..., Runs], arguments: tuple, threads: int) -> None:
    global _runs
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()  # it says of each run that a classifier is new
    transformers.logging.disable_progress_bar()
    _runs = make(*arguments)


def run_job(task: Any, method: Any) -> str | None:
    return _runs.run(task, method)


def run_all(
    jobs: list[tuple[Any, Any]], processes: int, make: Callable[..., Runs], arguments: tuple, threads: int
) -> list[str]:
    """Run the jobs, some at once; what went wrong.

    Args:
        make, arguments: make a process's `Runs`.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, context, begin, (make, arguments, threads)) as pool:
        futures = [pool.submit(run_job, *job) for job in jobs]
        try:
            return [said for future in futures if (said := future.result()) is not None]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
