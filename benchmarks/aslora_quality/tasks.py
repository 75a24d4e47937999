"""The two tasks of `benchmarks.aslora_quality`: reading, splitting, batching and scoring the data.

Banking77 is asked as generation of the intent's name, GSM8K as prediction of the worked answer. Both are lists of
(prompt, completion) pairs; only the completion's tokens carry loss.
"""

import csv
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.common.quality_arguments import DataError

Pair = tuple[str, str]
Encoded = tuple[list[int], int]  # token ids of prompt + completion, number of completion tokens


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


def encode(tokenizer, pairs: list[Pair]) -> list[Encoded]:
    """Token ids of prompt, completion and end-of-text token."""
    encoded = []
    for prompt, completion in pairs:
        done = tokenizer(completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        encoded.append((tokenizer(prompt, add_special_tokens=False)["input_ids"] + done, len(done)))
    return encoded


def training_batches(examples: list[Encoded], steps: int, batch_size: int, seed: int) -> list[list[Encoded]]:
    """`steps` batches drawn without replacement; of four consecutive ones, each holds examples of like length."""
    order = random.Random(seed)
    drawn = order.sample(examples, steps * batch_size)
    batches = []
    for start in range(0, len(drawn), 4 * batch_size):
        window = sorted(drawn[start : start + 4 * batch_size], key=lambda example: len(example[0]))
        chunk = [window[at : at + batch_size] for at in range(0, len(window), batch_size)]
        order.shuffle(chunk)
        batches += chunk
    return batches


def collate(batch: list[Encoded], device: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Left-padded model inputs, and labels [batch, longest completion] with -100 where no loss is."""
    width = max(len(ids) for ids, _ in batch)
    done = max(n for _, n in batch)
    ids, mask, labels = [], [], []
    for tokens, n in batch:
        pad = width - len(tokens)
        ids.append([0] * pad + tokens)
        mask.append([0] * pad + [1] * len(tokens))
        labels.append([-100] * (done - n) + tokens[len(tokens) - n :])
    attention = torch.tensor(mask, device=device)
    inputs = {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": attention,
        "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
    }
    return inputs, torch.tensor(labels, device=device)


def completion_logits(model, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Logits [batch, longest completion, vocabulary] that predict `labels`; no other position meets the vocabulary."""
    return model(**inputs, logits_to_keep=labels.shape[1] + 1).logits[:, :-1].float()


@torch.no_grad()
def score(model, examples: list[Encoded], device: str, batch_size: int = 16) -> list[tuple[int, float]]:
    """Per example, in the given order: (greedy generation equals the completion, mean loss of its completion tokens).

    Greedy generation writes the completion exactly when each of its tokens, the end-of-text token too, is the argmax
    after the true tokens before it: one forward pass decides it, and no decoding loop is run.
    """
    model.eval()
    results: dict[int, tuple[int, float]] = {}
    order = sorted(range(len(examples)), key=lambda index: len(examples[index][0]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        inputs, labels = collate([examples[index] for index in chosen], device)
        logits = completion_logits(model, inputs, labels)
        kept = labels != -100
        exact = ((logits.argmax(-1) == labels) | ~kept).all(1)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
        loss = loss.sum(1) / kept.sum(1)
        results.update(zip(chosen, zip(exact.int().tolist(), loss.tolist(), strict=True), strict=True))
    return [results[index] for index in range(len(examples))]
