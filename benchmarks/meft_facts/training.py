"""One run of `benchmarks.meft_facts`: train an adapter on facts, and ask for them."""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import runs
from benchmarks.common.data_files import rows_of
from benchmarks.common.protocol import Protocol, ends, train
from benchmarks.common.runs import Settings
from benchmarks.language.base_model import load_base
from benchmarks.language.completions import completion_losses, score
from benchmarks.language.facts import FILE, Recall, encode_pairs, epochs, load_pairs
from benchmarks.meft_facts.methods import Method, described

SMOLLM2 = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Task:
    """How many facts are trained, and how often each."""

    name: str
    facts: int
    passes: int


@dataclass(frozen=True)
class Setup:
    """What all runs share; the limits, in characters, keep a step cheap."""

    model: str
    batch_size: int
    max_question: int
    max_answer: int

    def recall(self, task: Task) -> Recall:
        """The facts of a task, and for how long they are trained."""
        steps = task.passes * (task.facts // self.batch_size)
        return Recall(task.facts, steps, self.batch_size, self.max_question, self.max_answer)

    def base(self, device: str):
        """The model in float32 and its tokenizer; SmolLM2 is that of the project's cache."""
        if self.model == SMOLLM2:
            return load_base(device)
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).to(device)
        return model, AutoTokenizer.from_pretrained(self.model)


class Runs(runs.Runs):
    """Facts are trained, and the same are asked for; seeds draw the adapter's start and the order."""

    def prepare(self, jobs: list[tuple[Task, Method]]) -> None:
        """Raises: DataError: there are too few facts."""
        tokenizer = self.settings.setup.base("cpu")[1]
        for task, _ in jobs:
            load_pairs(self.data, self.settings.setup.recall(task), tokenizer)

    def protocol_of(self, method: Method) -> Protocol:
        """With the method's own rates, if it has some."""
        return replace(self.settings.protocol, rates=method.rates) if method.rates else self.settings.protocol

    def result(self, task: Task, method: Method, rate: float, seed: int, split: str) -> dict:
        """One run; both splits ask for all facts, since what is tried is memory."""
        began, began_cpu = time.perf_counter(), time.process_time()
        setup, recall = self.settings.setup, self.settings.setup.recall(task)
        torch.manual_seed(seed)
        base, tokenizer = setup.base(self.device)
        facts = encode_pairs(tokenizer, load_pairs(self.data, recall, tokenizer))
        model = method.attach(base)
        batches = epochs(facts, recall.steps, recall.batch_size, seed)

        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        batch_losses = completion_losses(model, batches, self.device)
        values = train([{"params": trained, "lr": rate}], batch_losses, len(batches), method.optimizer)
        found = score(model, facts, self.device)
        loss = mean(each for _, each in found)
        return {
            "accuracy": mean(float(exact) for exact, _ in found),
            "loss": loss if math.isfinite(loss) else None,
            **ends(values),
            **described(model),
            "seconds": round(time.perf_counter() - began, 1),
            "cpu_seconds": round(time.process_time() - began_cpu, 1),
        }


def read_settings(path: Path) -> Settings:
    """As `benchmarks.common.runs.read_settings`, and a method without rates is refused where there are none of all."""
    settings = runs.read_settings(path, Setup, Task, Method)
    without = [method.name for method in settings.methods if not (method.rates or settings.protocol.rates)]
    if without:
        raise ValueError(f"{path.name}: {without} have no learning rate: give them rates, or rates of all methods.")
    return settings


def runs_of(path: Path, out: Path, data: Path, device: str) -> Runs:
    """Of a settings file and a rows file."""
    return Runs(read_settings(path), rows_of(out, data, [FILE]), data, device)
