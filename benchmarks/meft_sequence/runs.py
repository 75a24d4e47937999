"""The runs of `benchmarks.meft_sequence`."""

import math
import random
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.data_files import rows_of
from benchmarks.common.protocol import ends, train
from benchmarks.language.completions import Encoded, collate, completion_logits, completion_losses
from benchmarks.language.facts import encode_pairs, epochs
from benchmarks.meft_forgetting import runs
from benchmarks.meft_forgetting.methods import trainable
from benchmarks.meft_forgetting.runs import FILES, MISSED, Task
from benchmarks.meft_forgetting.texts import losses
from benchmarks.meft_sequence.methods import Method


@dataclass(frozen=True)
class Setup(runs.Setup):
    """What all runs share: `n_pairs` facts in `n_tasks` tasks of equal size, `passes` over each."""

    n_tasks: int

    def __post_init__(self) -> None:
        if self.n_pairs % self.n_tasks or self.steps < 1:
            raise ValueError(
                f"n_pairs={self.n_pairs} must be n_tasks={self.n_tasks} times the facts of a task, of which there must "
                f"be at least batch_size={self.batch_size}."
            )

    @property
    def steps(self) -> int:
        """Optimizer steps of a task."""
        return self.passes * (self.n_pairs // self.n_tasks // self.batch_size)


read_settings = partial(runs.read_settings, setup=Setup, method=Method)


# What is measured of a run whose loss became nan or inf.
STOPPED = {
    **dict.fromkeys(("recall", "kept", "untold"), 0.0),
    **{"recalls": [], "equal_logits": []},
    **dict.fromkeys(("told_loss", "untold_loss", "loss", "forgetting")),
}


@dataclass(frozen=True)
class Answers:
    """What a model says to the questions of a task.

    Attributes:
        logits: that predict the trained answers.
        recalled: share of the answers that greedy generation gives back, with their end.
        loss: mean of an answer's token.
    """

    logits: Tensor
    recalled: float
    loss: float


@dataclass
class Learned:
    """A task of a run.

    Attributes:
        answers: after this task and after each later one, while it is selected.
    """

    name: str
    facts: list[Encoded]
    answers: list[Answers]


@torch.no_grad()
def ask(model: nn.Module, facts: list[Encoded], device: str) -> Answers:
    """Greedy generation gives an answer exactly when each token of it is the likeliest after the true ones before it:
    one forward pass tells.
    """
    model.eval()
    inputs, labels = collate(facts, device)
    logits = completion_logits(model, inputs, labels)
    right = ((logits.argmax(-1) == labels) | (labels == -100)).all(1)
    return Answers(logits, float(right.double().mean()), float(F.cross_entropy(logits.flatten(0, 1), labels.flatten())))


class Runs(runs.Runs):
    """As those of `benchmarks.meft_forgetting`, over a sequence of tasks."""

    def told(self, row: dict) -> str:
        """A row in words."""
        return " ".join(f"{name} {100 * row[name]:.1f}" for name in ("recall", "kept", "untold"))

    def result(self, task: Task, method: Method, rate: float, seed: int, split: str) -> dict:
        """Train one adapter on task after task, and ask for the facts of all so far; the row's measured part."""
        began, began_cpu = time.perf_counter(), time.process_time()
        setup = self.settings.setup
        base, tokenizer = self.base()
        facts = random.Random(seed).sample(encode_pairs(tokenizer, self._pairs), setup.n_pairs)
        each = setup.n_pairs // setup.n_tasks
        torch.manual_seed(seed)
        with method.attach(base, self._texts.background) as model:
            sequence, trained, values = self._learn(
                model, method, [facts[start : start + each] for start in range(0, len(facts), each)], rate, seed
            )
            measured = self._measured(model, sequence, method) if len(sequence) == setup.n_tasks else STOPPED
        return {
            **measured,
            "values": values,
            **worst_ends(trained),
            "seconds": round(time.perf_counter() - began, 1),
            "cpu_seconds": round(time.process_time() - began_cpu, 1),
        }

    def _learn(
        self, model: nn.Module, method: Method, tasks: list[list[Encoded]], rate: float, seed: int
    ) -> tuple[list[Learned], list[list[float]], int]:
        """Train each task with an optimizer of its own. The last task stays selected.

        Returns:
            The tasks, up to one whose loss becomes nan or inf; the training losses of each, this one too; how many
            values there are to train.
        """
        setup = self.settings.setup
        sequence, trained, values = [], [], {}
        for number, facts in enumerate(tasks, 1):
            name = f"task {number}"
            method.begin(model, name)
            model.train()
            values |= {id(parameter): parameter.numel() for parameter in trainable(model)}
            batch_losses = completion_losses(model, epochs(facts, setup.steps, setup.batch_size, seed), self.device)
            trained.append(train([{"params": trainable(model), "lr": rate}], batch_losses, setup.steps))
            if not math.isfinite(trained[-1][-1]):
                break
            sequence.append(Learned(name, facts, [ask(model, facts, self.device)]))
            method.end(model, name)
            for earlier in sequence[:-1]:
                method.select(model, earlier.name)
                earlier.answers.append(ask(model, earlier.facts, self.device))
            method.select(model, name)
        return sequence, trained, sum(values.values())

    def _measured(self, model: nn.Module, sequence: list[Learned], method: Method) -> dict:
        """What the model, as the last training has left it, knows of the tasks and has forgotten."""
        assert self._before is not None
        untold = [ask(model, learned.facts, self.device) for learned in sequence]
        after = losses(model, self._texts)
        recalled = mean(learned.answers[0].recalled for learned in sequence)
        forgotten = mean(after[name] - self._before[name] for name in after)
        told_loss, loss = mean(learned.answers[-1].loss for learned in sequence), mean(one.loss for one in untold)
        finite, least = math.isfinite(told_loss + loss + forgotten), self.settings.setup.least_recall
        missed = 0.0 if recalled >= least else MISSED + least - recalled
        return {
            "recall": recalled,
            "kept": mean(learned.answers[-1].recalled for learned in sequence[:-1]),
            "untold": mean(answers.recalled for answers in untold[:-1]),
            "recalls": [[answers.recalled for answers in learned.answers] for learned in sequence],
            "equal_logits": [
                torch.equal(learned.answers[0].logits, learned.answers[-1].logits) for learned in sequence[:-1]
            ],
            "told_loss": told_loss if finite else None,
            "untold_loss": loss if finite else None,
            "loss": (told_loss if method.chosen_by == "told" else loss) + missed if finite else None,
            "forgetting": forgotten if finite else None,
        }


def worst_ends(trained: list[list[float]]) -> dict[str, float | None]:
    """The ends of the training losses of the task whose losses fell least: a run has diverged if one task has."""
    found = [ends(values) for values in trained]

    def rise(one: dict[str, float | None]) -> float:
        first, last = one["first_train_loss"], one["last_train_loss"]
        return math.inf if first is None or last is None else last - first

    return max(found, key=rise)


def runs_of(path: Path, out: Path, data: Path, device: str) -> Runs:
    """Of a settings file and a rows file."""
    return Runs(read_settings(path), rows_of(out, data, FILES), data, device)
