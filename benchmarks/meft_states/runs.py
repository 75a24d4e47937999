"""The runs of `benchmarks.meft_states`."""

import datetime
import time
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean

import torch
from torch import nn
from transformers import get_linear_schedule_with_warmup

from benchmarks.common.environment import environment
from benchmarks.common.rows import Rows
from benchmarks.language.adapters import attach, trainable_values
from benchmarks.language.base_model import load_base
from benchmarks.language.completions import Encoded, completion_losses
from benchmarks.language.facts import Pair, Recall, encode_pairs, epochs, exact_match, recall

RATE = 1e-3
R = 1024


@dataclass(frozen=True)
class Way:
    """How masters and moments of MEFT's rows are kept."""

    master: str
    mode: str

    @property
    def name(self) -> str:
        """The method of its rows."""
        return f"{self.master} masters, moments {self.mode}"

    @property
    def settings(self) -> dict:
        """What a row depends on beside the task."""
        states = {"master_dtype": self.master, "row_optimizer": {"moments": self.mode}}
        return {"kind": "meft", "r": R, "fields": {"experts_per_token": 8, "top_k": 64} | states}

    def attach(self, model: nn.Module) -> nn.Module:
        """The model with MEFT, of which only MEFT is trained."""
        return attach(model, "meft", R, self.settings["fields"])


def train(model, batches: list[list[Encoded]], rate: float, device: str) -> list[float]:
    """Train on `batches`, each once; their losses. The rate rises for 6 % of the steps, then falls linearly."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, int(0.06 * len(batches)), len(batches))
    model.train()
    losses = []
    for loss in completion_losses(model, batches, device):
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def run_row(task: Recall, way: Way, seed: int, pairs: list[Pair], device: str) -> dict:
    """Train on the pairs and ask for them again; the row's measured part. `train_loss` is that of the last pass."""
    began, began_cpu = time.perf_counter(), time.process_time()
    torch.manual_seed(seed)
    model, tokenizer = load_base(device)
    model = way.attach(model)
    batches = epochs(encode_pairs(tokenizer, pairs), task.steps, task.batch_size, seed)
    losses = train(model, batches, RATE, device)
    said = recall(model, tokenizer, pairs, device)
    exact = [exact_match(answer, pair.answers[:1]) for answer, pair in zip(said, pairs, strict=True)]
    return {
        "exact_match": mean(map(float, exact)),
        "train_loss": mean(losses[-(task.n_pairs // task.batch_size) :]),
        "trainable_values": trainable_values(model),
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - began_cpu, 1),
        "exact": "".join(str(int(hit)) for hit in exact),
        "losses": [round(loss, 4) for loss in losses],
    }


def run_all(rows: Rows, ways: list[Way], seeds: Iterable[int], task: Recall, pairs: list[Pair], device: str) -> None:
    """Run what is missing, seed after seed: pairs are whole as early as can be."""
    for seed in seeds:
        for way in ways:
            key = {"task": task.name, "method": way.name, "seed": seed, "split": "test", "learning_rate": RATE}
            settings = way.settings | task.settings() | {"device": device}
            if rows.find(key, settings) is not None:
                continue
            date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            found = run_row(task, way, seed, pairs, device)
            row = rows.add(key | {"settings": settings, "date": date} | found, environment(device))
            said = f"recall {100 * row['exact_match']:.1f} loss {row['train_loss']:.4f} {row['seconds']} s"
            print(date, *key.values(), said, flush=True)
