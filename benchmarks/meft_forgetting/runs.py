"""The runs of `benchmarks.meft_forgetting`."""

import itertools
import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import runs
from benchmarks.common.data_files import rows_of
from benchmarks.common.protocol import Protocol, ends, train
from benchmarks.common.rows import Rows
from benchmarks.common.runs import Settings
from benchmarks.language.base_model import load_base
from benchmarks.language.completions import completion_losses
from benchmarks.language.facts import FILE, Recall, encode_pairs, epochs, exact_match, load_pairs, recall
from benchmarks.meft_forgetting import texts
from benchmarks.meft_forgetting.methods import Method, trainable
from benchmarks.meft_forgetting.texts import load_other, load_texts, losses

FILES = (FILE, *texts.FILES)
MISSED = 10.0  # added to the forgetting of a run that recalls too little, so that others are chosen


@dataclass(frozen=True)
class Setup:
    """What all runs share: `passes` over `n_pairs` facts; the rest as in `load_texts`."""

    task: str
    n_pairs: int
    passes: int
    batch_size: int
    tokens: int
    window: int
    background: int
    least_recall: float

    @property
    def steps(self) -> int:
        """Optimizer steps of a run."""
        return self.passes * (self.n_pairs // self.batch_size)


@dataclass(frozen=True)
class Task:
    """There is one, whose name is that of `Setup.task`."""

    name: str


def read_settings(path: Path, setup: type[Setup] = Setup, method: type[Method] = Method) -> Settings:
    """Read a settings file, whose methods have rates of their own.

    Args:
        setup, method: the benchmark's dataclasses.

    Raises:
        OSError: there is none.
        ValueError, KeyError, TypeError: it is not as settings.json is.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    return Settings(
        setup(**{name: content[name] for name in setup.__dataclass_fields__}),
        Protocol((), tuple(content["tuning_seeds"]), tuple(content["seeds"])),
        [Task(content["task"])],
        [method(**one) for one in content["methods"]],
        path.parent / content["comparisons"],
        tuple(content.get("shares", ())),
    )


def with_replay(
    batch_losses: Iterable[torch.Tensor], model: nn.Module, background: list[torch.Tensor]
) -> Iterator[torch.Tensor]:
    """Each loss, and that of a token of the next text of the background, which begins anew at its end."""
    for loss, ids in zip(batch_losses, itertools.cycle(background), strict=False):
        yield loss + model(input_ids=ids, labels=ids).loss


def needs_other(settings: Settings) -> bool:
    """Whether a method counts rows on text of another kind."""
    return any(method.background_text == "other text" for method in settings.methods)


class Runs(runs.Runs):
    """Reads the data as it is made.

    Raises:
        DataError: the data is not there, or not as it must be.
    """

    def __init__(self, settings: Settings, rows: Rows, data: Path, device: str) -> None:
        super().__init__(settings, rows, data, device)
        setup = settings.setup
        self._before: dict[str, float] | None = None
        tokenizer = load_base("cpu")[1]
        self._pairs = load_pairs(data, Recall(setup.n_pairs, setup.steps, setup.batch_size), tokenizer)
        self._texts = load_texts(data, tokenizer, setup.tokens, setup.window, setup.background, device)
        self._other = []
        if needs_other(settings):
            self._other = load_other(data, tokenizer, setup.window, setup.background, device)

    def prepare(self, jobs: list[tuple[Task, Method]]) -> None:
        """All is read."""

    def base(self):
        """A fresh model, whose losses are known from then on, and its tokenizer."""
        base, tokenizer = load_base(self.device)
        if self._before is None:
            self._before = losses(base, self._texts)
        return base, tokenizer

    def protocol_of(self, method: Method) -> Protocol:
        """With the method's rates."""
        return replace(self.settings.protocol, rates=method.rates)

    def told(self, row: dict) -> str:
        """A row in words."""
        return f"recall {100 * row['recall']:.1f} forgetting {row['forgetting']}"

    def result(self, task: Task, method: Method, rate: float, seed: int, split: str) -> dict:
        """Train one adapter on the facts, ask for them, and see what it has forgotten; the row's measured part."""
        began, began_cpu = time.perf_counter(), time.process_time()
        setup = self.settings.setup
        base, tokenizer = self.base()
        batches = epochs(encode_pairs(tokenizer, self._pairs), setup.steps, setup.batch_size, seed)
        torch.manual_seed(seed)
        background = self._other if method.background_text == "other text" else self._texts.background
        with method.attach(base, background) as model:
            model.train()
            batch_losses = completion_losses(model, batches, self.device)
            if method.replay:
                batch_losses = with_replay(batch_losses, model, background)
            trained = train([{"params": trainable(model), "lr": rate}], batch_losses, setup.steps)
            said = recall(model, tokenizer, self._pairs, self.device)
            after = losses(model, self._texts)
        right = [exact_match(answer, pair.answers[:1]) for answer, pair in zip(said, self._pairs, strict=True)]
        recalled = sum(right) / len(right)
        forgotten = sum(after[name] - self._before[name] for name in after) / len(after)
        forgetting = forgotten if math.isfinite(forgotten) else None
        missed = 0.0 if recalled >= setup.least_recall else MISSED + setup.least_recall - recalled
        return {
            "recall": recalled,
            "forgetting": forgetting,
            "loss": None if forgetting is None else forgetting + missed,
            "losses_before": self._before,
            "losses_after": {name: value if math.isfinite(value) else None for name, value in after.items()},
            "values": sum(parameter.numel() for parameter in trainable(model)),
            **ends(trained),
            "seconds": round(time.perf_counter() - began, 1),
            "cpu_seconds": round(time.process_time() - began_cpu, 1),
        }


def runs_of(path: Path, out: Path, data: Path, device: str) -> Runs:
    """Of a settings file and a rows file."""
    settings = read_settings(path)
    files = [*FILES, texts.OTHER] if needs_other(settings) else FILES
    return Runs(settings, rows_of(out, data, files), data, device)
