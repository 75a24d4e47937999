"""A run of `benchmarks.meft_routing`: training on WikiText-2 while the routing is watched."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch
from peft import get_peft_model
from torch import Tensor

from benchmarks.common.places import SMOLLM2
from benchmarks.common.protocol import train
from benchmarks.common.quality_arguments import DataError
from benchmarks.language.base_model import load_base, load_tokenizer
from benchmarks.meft_routing.watch import busiest, counts, never, perplexity
from meft import MEFTConfig

RATE = 1e-3
FILES = ("wikitext2/valid.txt", "wikitext2/test.txt")  # to train on, and to measure on
RECORDS = 10  # of a run


@dataclass(frozen=True)
class Setup:
    """What the runs share: `batch` windows of `window` tokens a step; `held_out` windows are measured on.

    Attributes:
        model: its folder.
    """

    steps: int
    r: int
    batch: int = 2
    window: int = 48
    held_out: int = 8
    model: Path = SMOLLM2

    @property
    def name(self) -> str:
        """The task of the rows, of which each model has its own."""
        return f"r {self.r}, {self.steps} steps" + ("" if self.model == SMOLLM2 else f", {self.model.name}")

    def settings(self) -> dict[str, object]:
        """What a row depends on."""
        model = SMOLLM2.name if self.model == SMOLLM2 else str(self.model)  # rows hold no path of the project's folder
        return asdict(self) | {"text": "wikitext2", "learning_rate": RATE, "model": model}


@dataclass(frozen=True)
class Texts:
    """Windows of tokens: to train on, [n, window], and to measure on, [held_out, window]."""

    train: Tensor
    held_out: Tensor


def load_texts(data: Path, setup: Setup) -> Texts:
    """Read `wikitext2/`: its validation file to train on, its test file to measure on.

    Raises:
        DataError: a file is missing, or too short for the steps.
    """
    tokenizer = load_tokenizer(setup.model)
    windows = []
    for name, count in zip(FILES, (setup.steps * setup.batch, setup.held_out), strict=True):
        try:
            text = (data / name).read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(f"--data {data}: cannot read wikitext2/ there ({error!r}).") from error
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        found = ids[: len(ids) // setup.window * setup.window].view(-1, setup.window)
        if len(found) < count:
            raise DataError(f"--data: {name} has {len(found)} windows where {count} are needed.")
        windows.append(found)
    return Texts(windows[0], windows[1][: setup.held_out])


def run(setup: Setup, texts: Texts, balance: float, seed: int, device: str) -> dict:
    """Train one adapter; the row's measured part. Its lists have a number for each layer.

    No window is trained on twice. Load and |U| / r are those of the steps since the record before.
    """
    began, began_cpu = time.perf_counter(), time.process_time()
    torch.manual_seed(seed)
    config = MEFTConfig(r=setup.r, task_type="CAUSAL_LM", router_aux_loss_coef=balance)
    model = get_peft_model(load_base(device, setup.model)[0], config)
    order = torch.randperm(len(texts.train), generator=torch.Generator().manual_seed(seed))
    batches = texts.train[order[: setup.steps * setup.batch]].view(setup.steps, setup.batch, setup.window)
    held_out = texts.held_out.to(device)
    picked = torch.zeros_like(counts(model).load, dtype=torch.bool)
    records: list[dict] = []
    losses: list[float] = []

    def measured() -> dict:
        """Loss and |U| / r of the text held out, in one micro-batch."""
        before = counts(model)
        model.eval()
        with torch.no_grad():
            loss = model(input_ids=held_out, labels=held_out).loss.item()
        model.train()
        share = (counts(model) - before).union_share
        return {"held_out_loss": round(loss, 4), "held_out_union": numbers(share)}

    def step_losses() -> Iterator[Tensor]:
        records.append({"step": 0} | measured())
        since = counts(model)
        for step, ids in enumerate(batches, 1):
            ids = ids.to(device)
            loss = model(input_ids=ids, labels=ids).loss
            losses.append(loss.item())
            yield loss  # the step is done when this goes on
            if step % max(1, setup.steps // RECORDS) and step < setup.steps:
                continue
            window = counts(model) - since
            picked.logical_or_(window.load > 0)
            records.append(
                {
                    "step": step,
                    "train_loss": round(mean(losses), 4),
                    "perplexity": numbers(perplexity(window.load)),
                    "busiest": numbers(busiest(window.load)),
                    "never_picked": numbers(never(picked)),
                    "union": numbers(window.union_share),
                }
                | measured()
            )
            losses.clear()
            since = counts(model)

    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    train([{"params": trained, "lr": RATE}], step_losses(), setup.steps)
    return {
        "experts": config.experts,
        "probed": config.probed,
        "records": records,
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - began_cpu, 1),
    }


def numbers(values: Tensor) -> list[float]:
    """For a row."""
    return [round(value, 4) for value in values.tolist()]
