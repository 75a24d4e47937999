"""The two tasks of `benchmarks.aslora_quality`: reading and splitting the data.

Banking77 is asked as generation of the intent's name, GSM8K as prediction of the worked answer. Both are lists of
(prompt, completion) pairs; only the completion's tokens carry loss.
"""

import csv
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.common.quality_arguments import DataError

Pair = tuple[str, str]


@dataclass(frozen=True)
class Task:
    """What one task trains and scores on. A learning rate is chosen after `lr_steps`, all else is done with `steps`.

    `max_chars` bounds prompt + completion, so that a step stays cheap; longer examples are left out of every split.
    """

    name: str
    metric: str
    steps: int
    lr_steps: int
    batch_size: int
    max_chars: int
    n_valid: int
    n_test: int
    n_intents: int = 0

    @property
    def files(self) -> tuple[str, str]:
        """For training and for tests, below the folder of the data sets."""
        suffix = "csv" if self.name == "banking77" else "jsonl"
        return f"{self.name}/train.{suffix}", f"{self.name}/test.{suffix}"

    def settings(self) -> dict:
        """What a row depends on, whatever chose its learning rate."""
        return {name: value for name, value in asdict(self).items() if name != "lr_steps"}


TASKS = {
    "banking77": Task("banking77", "exact match", 32, 32, 8, 90, 80, 200, 12),
    "gsm8k": Task("gsm8k", "answer loss", 24, 12, 3, 270, 24, 40),
}


def read_banking(path: Path) -> list[Pair]:
    """All rows of a banking77 CSV as (query, intent in words)."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    words = {row["category"]: row["category"].replace("_", " ").strip("?").lower() for row in rows}
    return [(" ".join(row["text"].split()) + "\nIntent:", " " + words[row["category"]]) for row in rows]


def read_gsm8k(path: Path) -> list[Pair]:
    """All rows of a GSM8K JSONL file as (question, worked answer)."""
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    return [(f"Question: {row['question'].strip()}\nAnswer:", " " + row["answer"].strip()) for row in rows]


def load_splits(data: Path, task: Task) -> dict[str, list[Pair]]:
    """Read one task: `train` and `valid` come from the training file, `test` from the test file.

    The splits are the same for every method and seed, and no prompt is in two of them. Raises DataError if a file
    is missing or unreadable.
    """
    read = read_banking if task.name == "banking77" else read_gsm8k
    try:
        pool, test = (read(data / name) for name in task.files)
    except (OSError, KeyError, TypeError, AttributeError, ValueError, csv.Error) as error:
        raise DataError(
            f"--data {data}: cannot read {' and '.join(task.files)} there ({error!r}); "
            "give the folder that holds banking77/ and gsm8k/."
        ) from error
    if task.n_intents:
        intents = set(random.Random(0).sample(sorted({label for _, label in pool}), task.n_intents))
        pool, test = ([pair for pair in pairs if pair[1] in intents] for pairs in (pool, test))
    return split(pool, test, task)


def split(pool: list[Pair], test: list[Pair], task: Task) -> dict[str, list[Pair]]:
    """Filter by length, drop repeated prompts, and cut `valid` off the training pool."""
    pool, test = (
        list(
            {prompt.lower(): (prompt, done) for prompt, done in pairs if len(prompt + done) <= task.max_chars}.values()
        )
        for pairs in (pool, test)
    )
    tested = {prompt.lower() for prompt, _ in test}
    pool = [pair for pair in pool if pair[0].lower() not in tested]
    random.Random(1).shuffle(pool)
    random.Random(2).shuffle(test)
    splits = {"valid": pool[: task.n_valid], "train": pool[task.n_valid :], "test": test[: task.n_test]}
    if len(splits["train"]) < task.steps * task.batch_size or len(splits["test"]) < task.n_test:
        raise DataError(f"--data: {task.name} has too few examples of at most {task.max_chars} characters.")
    return splits
