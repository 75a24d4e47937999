"""Reading, splitting and batching what `benchmarks.aslora_classify` classifies.

A data set is a folder with `train.csv` and `test.csv`, each with the columns `text` and `category`.
"""

import argparse
import csv
import random
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common.quality_arguments import DataError

Example = tuple[list[int], int]  # token ids, class
Rows = list[tuple[str, str]]  # text, category


@dataclass(frozen=True)
class Splits:
    """One data set, encoded. `pool` is what a run draws its examples from; the other two are the same for all runs."""

    classes: tuple[str, ...]
    pool: list[Example]
    valid: list[Example]
    test: list[Example]


def read(path: Path) -> list[tuple[str, str]]:
    """(text, category) of each row, texts that differ in blanks or case only once.

    Raises:
        DataError: there is no such file, or it lacks a column.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [(" ".join(row["text"].split()), row["category"].strip()) for row in csv.DictReader(file)]
    except (OSError, KeyError, AttributeError, ValueError, csv.Error) as error:
        raise DataError(
            f"--data: cannot read {path} ({error!r}); it must be a CSV file with the columns text and category."
        ) from error
    return list({text.lower(): (text, category) for text, category in rows}.values())


def write(folder: Path, train: Rows, test: Rows) -> None:
    """Make a data set."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("test", test), ("train", train)):
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "category"), *rows])


def convert(
    doc: str | None, holds: str, name: str, read_rows: Callable[[Path], dict[str, list[tuple[str, str]]]]
) -> int:
    """The program that makes the data set `name` below a folder from a file of somebody else.

    Args:
        doc: what `--help` says. holds: which file is read.
        read_rows: reads it, rows of "train" and of "test"; may raise OSError, TarError or ValueError.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help=holds)
    parser.add_argument("data", type=Path, help=f"folder that gets {name}/")
    args = parser.parse_args()
    try:
        rows = read_rows(args.file)
    except (OSError, tarfile.TarError, ValueError) as error:
        print(f"{args.file}: {error}", file=sys.stderr)
        return 2
    write(args.data / name, **rows)
    print(f"{len(rows['train'])} and {len(rows['test'])} texts in {args.data / name}")
    return 0


def load_splits(folder: Path, tokenizer, examples: int, n_valid: int, n_test: int, max_tokens: int) -> Splits:
    """Read a data set: `valid` comes from the training file, and no text is in two splits.

    Raises:
        DataError: a file is missing or unreadable, has too few rows, or tests a class that is not trained.
    """
    train, test = read(folder / "train.csv"), read(folder / "test.csv")
    tested = {text.lower() for text, _ in test}
    train = [row for row in train if row[0].lower() not in tested]
    random.Random(1).shuffle(train)
    random.Random(2).shuffle(test)
    if len(train) < n_valid + examples or len(test) < n_test:
        raise DataError(
            f"--data: {folder} has {len(train)} texts for training and {len(test)} for tests, each once and in one of "
            f"them only; {n_valid + examples} and {n_test} are needed."
        )
    classes = tuple(sorted({category for _, category in train}))
    unknown = {category for _, category in test} - set(classes)
    if unknown:
        raise DataError(f"--data: {folder}/test.csv has categories that train.csv lacks: {sorted(unknown)[:3]}.")

    def encoded(rows: list[tuple[str, str]]) -> list[Example]:
        if not rows:
            return []
        ids = tokenizer([text for text, _ in rows], truncation=True, max_length=max_tokens)["input_ids"]
        return [(one, classes.index(category)) for one, (_, category) in zip(ids, rows, strict=True)]

    return Splits(classes, encoded(train[n_valid:]), encoded(train[:n_valid]), encoded(test[:n_test]))


def batches(pool: list[Example], examples: int, passes: int, batch_size: int, seed: int) -> list[list[Example]]:
    """Draw `examples` without replacement and go over them `passes` times, each time in a new order.

    Of four consecutive batches, each holds examples of like length: a third less is padded.
    """
    order = random.Random(seed)
    drawn = order.sample(pool, examples)
    listed = []
    for _ in range(passes):
        order.shuffle(drawn)
        for start in range(0, examples, 4 * batch_size):
            window = sorted(drawn[start : start + 4 * batch_size], key=lambda example: len(example[0]))
            parts = [window[at : at + batch_size] for at in range(0, len(window), batch_size)]
            order.shuffle(parts)
            listed += parts
    return listed


def collate(batch: list[Example], pad: int, device: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Right-padded model inputs [batch, longest], and the classes [batch]."""
    width = max(len(ids) for ids, _ in batch)
    ids = [ids + [pad] * (width - len(ids)) for ids, _ in batch]
    mask = [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch]
    inputs = {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }
    return inputs, torch.tensor([label for _, label in batch], device=device)
