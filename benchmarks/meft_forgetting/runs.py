"""The runs of `benchmarks.meft_forgetting`: which a settings file asks for, and making those that a rows file lacks."""

import concurrent.futures
import datetime
import json
import math
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.aslora_quality.__main__ import load_base
from benchmarks.aslora_quality.tasks import collate, completion_logits
from benchmarks.common.environment import environment
from benchmarks.common.protocol import DIVERGED, REPORTED, Protocol, diverged, ends, run_method, train
from benchmarks.common.rows import Rows
from benchmarks.meft_forgetting.methods import Method, trainable
from benchmarks.meft_forgetting.texts import load_texts, losses
from benchmarks.meft_recall.pairs import Recall, encode_pairs, epochs, exact_match, load_pairs, recall

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
class Settings:
    """A settings file."""

    setup: Setup
    tuning_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    methods: list[Method]
    comparisons: Path

    def protocol(self, method: Method) -> Protocol:
        """How the method's rate is chosen."""
        return Protocol(method.rates, self.tuning_seeds, self.seeds)


def read_settings(path: Path) -> Settings:
    """Read a settings file.

    Raises:
        OSError: there is none.
        ValueError, KeyError, TypeError: it is not as settings.json is.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    return Settings(
        Setup(**{name: content[name] for name in Setup.__dataclass_fields__}),
        tuple(content["tuning_seeds"]),
        tuple(content["seeds"]),
        [Method(**one) for one in content["methods"]],
        path.parent / content["comparisons"],
    )


class Runs:
    """Makes the runs that a rows file lacks; reads the data as it is made.

    Raises:
        DataError: the data is not there, or not as it must be.
    """

    def __init__(self, settings: Settings, rows: Rows, data: Path, device: str) -> None:
        self.settings, self.rows, self.device, setup = settings, rows, device, settings.setup
        self._before: dict[str, float] | None = None
        tokenizer = load_base("cpu")[1]
        self._pairs = load_pairs(data, Recall(setup.n_pairs, setup.steps, setup.batch_size), tokenizer)
        self._texts = load_texts(data, tokenizer, setup.tokens, setup.window, setup.background, device)

    def once(self, method: Method, rate: float, seed: int, split: str) -> dict:
        """The row of one run, found or new; one that diverged and was to be reported is kept as such."""
        setup = self.settings.setup
        key = {"task": setup.task, "method": method.name, "seed": seed, "split": split, "learning_rate": rate}
        settings = asdict(setup) | method.settings | {"device": self.device}
        found = self.rows.find(key, settings)
        if found is None and split == REPORTED:
            found = self.rows.find(key | {"split": DIVERGED}, settings)
        if found is not None:
            return found
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        result = self._row(method, rate, seed)
        if split == REPORTED and diverged(result):
            key["split"] = DIVERGED
        row = self.rows.add(key | {"settings": settings, "date": date} | result, environment(self.device))
        told = f"recall {100 * row['recall']:.1f} forgetting {row['forgetting']} {row['seconds']} s"
        print(date, *key.values(), told, flush=True)
        return row

    def _row(self, method: Method, rate: float, seed: int) -> dict:
        """Train one adapter on the facts, ask for them, and see what it has forgotten; the row's measured part."""
        began, began_cpu = time.perf_counter(), time.process_time()
        setup = self.settings.setup
        base, tokenizer = load_base(self.device)
        if self._before is None:
            self._before = losses(base, self._texts)
        batches = epochs(encode_pairs(tokenizer, self._pairs), setup.steps, setup.batch_size, seed)
        torch.manual_seed(seed)
        with method.attach(base, self._texts.background) as model:
            model.train()

            def batch_losses() -> Iterator[torch.Tensor]:
                for batch in batches:
                    inputs, labels = collate(batch, self.device)
                    logits = completion_logits(model, inputs, labels)
                    yield F.cross_entropy(logits.flatten(0, 1), labels.flatten())

            trained = train([{"params": trainable(model), "lr": rate}], batch_losses(), setup.steps)
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

    def run(self, method: Method) -> str | None:
        """All runs of a method; a sentence where the protocol finds no rate."""
        try:
            for _ in run_method(lambda *run: self.once(method, *run), self.settings.protocol(method)):
                pass
        except RuntimeError as error:
            return f"{method.name}: {error}"
        return None


_runs: Runs  # of a worker process


def begin(settings: Path, out: Path, data: Path, device: str, threads: int) -> None:
    global _runs
    torch.set_num_threads(threads)
    _runs = Runs(read_settings(settings), Rows(out), data, device)


def run_job(method: Method) -> str | None:
    return _runs.run(method)


def run_all(methods: list[Method], processes: int, arguments: tuple) -> list[str]:
    """Run all methods, some at once; what went wrong."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, context, begin, arguments) as pool:
        futures = [pool.submit(run_job, method) for method in methods]
        try:
            return [said for future in futures if (said := future.result()) is not None]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
