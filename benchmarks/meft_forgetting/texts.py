"""Texts on which `benchmarks.meft_forgetting` sees what a model has forgotten, and those that it counts rows on."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.quality_arguments import DataError
from benchmarks.language.completions import collate, completion_logits, encode

OTHER = "banking77/train.csv"
FILES = ("wikitext2/test.txt", "wikitext2/valid.txt", "gsm8k/train.jsonl", "gsm8k/test.jsonl")


@dataclass(frozen=True)
class Texts:
    """Texts as token ids.

    Attributes:
        windows: of WikiText-2's test file, [1, window] each.
        answers: of GSM8K's test file, one batch each: (inputs, labels).
        background: of WikiText-2's validation file and GSM8K's training file, [1, T] each.
    """

    windows: list[Tensor]
    answers: list[tuple[dict[str, Tensor], Tensor]]
    background: list[Tensor]


def read_gsm8k(path: Path) -> list[tuple[str, str]]:
    """All rows of a GSM8K JSONL file as (question, worked answer)."""
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    return [(f"Question: {row['question'].strip()}\nAnswer:", " " + row["answer"].strip()) for row in rows]


def load_texts(data: Path, tokenizer, tokens: int, window: int, background: int, device: str) -> Texts:
    """Read `wikitext2/` and `gsm8k/`.

    Args:
        tokens: of each text for measuring, at most.
        window: tokens that are read at once.
        background: examples of each text to count rows on.

    Raises:
        DataError: a file is not there, or not as it must be.
    """
    try:
        test, valid = ((data / name).read_text(encoding="utf-8") for name in FILES[:2])
        train_pairs, test_pairs = (read_gsm8k(data / name) for name in FILES[2:])
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"--data {data}: cannot read wikitext2/ and gsm8k/ there ({error!r}).") from error
    answers, used = [], 0
    for example in encode(tokenizer, test_pairs[:200]):
        used += len(example[0])
        if used > tokens:
            break
        answers.append(collate([example], device))
    if not answers or len(train_pairs) < background:
        raise DataError(
            f"--data {data}: gsm8k has {len(answers)} examples of at most {tokens} tokens for tests and "
            f"{len(train_pairs)} for training; 1 and {background} are needed."
        )
    return Texts(
        _windows(tokenizer, test, tokens // window, window, device),
        answers,
        _windows(tokenizer, valid, background, window, device)
        + [torch.tensor([ids], device=device) for ids, _ in encode(tokenizer, train_pairs[:background])],
    )


def load_other(data: Path, tokenizer, window: int, background: int, device: str) -> list[Tensor]:
    """As many examples as `Texts.background` has, of the queries of banking77; arguments as of `load_texts`.

    Raises:
        DataError: the file is not there, or not as it must be.
    """
    try:
        with open(data / OTHER, newline="", encoding="utf-8") as file:
            text = " ".join(row["text"] for row in csv.DictReader(file))
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise DataError(f"--data {data}: cannot read {OTHER} there ({error!r}).") from error
    return _windows(tokenizer, text, 2 * background, window, device)


def _windows(tokenizer, text: str, count: int, window: int, device: str) -> list[Tensor]:
    ids = tokenizer(text[: 12 * count * window], add_special_tokens=False)["input_ids"]
    if len(ids) < count * window:
        raise DataError(f"--data: a text has {len(ids)} tokens where {count * window} are needed.")
    return [torch.tensor([ids[i * window : (i + 1) * window]], device=device) for i in range(count)]


@torch.no_grad()
def losses(model: nn.Module, texts: Texts) -> dict[str, float]:
    """Mean loss of a token, in nats: of the windows, and of the answers."""
    model.eval()
    found: dict[str, list[Tensor]] = {"wikitext2": [], "gsm8k": []}
    for ids in texts.windows:
        logits = model(input_ids=ids).logits[0, :-1].float()
        found["wikitext2"].append(F.cross_entropy(logits, ids[0, 1:], reduction="none"))
    for inputs, labels in texts.answers:
        logits = completion_logits(model, inputs, labels)
        found["gsm8k"].append(F.cross_entropy(logits[0], labels[0], reduction="none"))
    return {name: float(torch.cat(parts).mean()) for name, parts in found.items()}
