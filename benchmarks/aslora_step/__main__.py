"""Time of a training step of ASLoRA beside PEFT's LoRA with the same rank and targets, and what both weigh.

    python -m benchmarks.aslora_step            # all rows, about 20 minutes on 2 cores; a rerun goes on
    python -m benchmarks.aslora_step --quick    # fewer pairs, without the largest model; keeps no result

Both methods run interleaved in one process over the same frozen weights: a pair is one step (forward, backward,
optimizer) of each, in changing order; the row's number is the median of the pairs' ratios with a bootstrap interval.
While the pairs run, merges are pending, so that each step of ASLoRA includes its running averages. Then come merge
steps, and pairs after the last merge. Nothing is reported unless the checks of the same run have passed.
"""

import argparse
import copy
import datetime
import gc
import json
import os
import re
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from aslora import ASLoRAConfig
from aslora_meft.demo import smollm2
from benchmarks.common.environment import environment
from peft_bridge import replace_file

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "aslora_step.json"
TARGETS = {"q,v": ["q_proj", "v_proj"], "all-linear": "all-linear"}
STEP_LIMIT, MERGE_LIMIT = 1.03, 1.0  # times a step of LoRA; extra steps of ASLoRA
WARM_UP, MERGES = 3, 3


class Rows:
    """The result file: `environments` (each distinct one once) and one row for each model and set of targets."""

    def __init__(self, path: Path):
        self.path = path
        self.content = json.loads(path.read_text()) if path.exists() else {"environments": [], "rows": []}

    def find(self, key: dict) -> dict | None:
        """The row with these entries; None if there is none."""
        return next((row for row in self.content["rows"] if key.items() <= row.items()), None)

    def add(self, row: dict, environment: dict) -> None:
        """Put a row in the place of an older one for the same model and targets, and replace the file whole."""
        if environment not in self.content["environments"]:
            self.content["environments"].append(environment)
        row["environment"] = self.content["environments"].index(environment)
        kept = [old for old in self.content["rows"] if (old["model"], old["targets"]) != (row["model"], row["targets"])]
        self.content["rows"] = [*kept, row]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, (json.dumps(self.content, indent=1) + "\n").encode())


@dataclass(frozen=True)
class Model:
    """A base model with the batch that suits it."""

    name: str
    layers: int
    width: int
    r: int
    batch: tuple[int, int]  # sequences, tokens
    intermediate: int | None = None

    def make(self) -> LlamaForCausalLM:
        """The base model: SmolLM2 from the project's cache, all others random."""
        if self.intermediate is None:
            folder = ROOT / ".cache" / "SmolLM2-135M-Instruct"
            smollm2.convert(folder)
            return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=1024,
            hidden_size=self.width,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=max(1, self.width // 64),
            use_cache=False,
        )
        return LlamaForCausalLM(config)


MODELS = [
    Model("SmolLM2-135M", layers=30, width=576, r=8, batch=(1, 128)),
    Model("Llama 12 x 1024", layers=12, width=1024, r=8, batch=(2, 64), intermediate=2816),
    Model("Llama 32 x 2048", layers=32, width=2048, r=64, batch=(1, 64), intermediate=4096),
]
QUICK = MODELS[:2]
TOY = Model("toy", layers=4, width=32, r=4, batch=(1, 8), intermediate=48)  # for the test of this file


class Contestant:
    """One method over the base model, with its optimizer."""

    def __init__(self, base: LlamaForCausalLM, config: LoraConfig | ASLoRAConfig, batch: torch.Tensor):
        # Its own modules, over the one set of frozen weights.
        twin = copy.deepcopy(base, memo={id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())})
        torch.manual_seed(0)
        self.model: PeftModel = get_peft_model(twin, config)
        self.batch = batch
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-4)
        self.model.train()

    def loss(self) -> torch.Tensor:
        return self.model(input_ids=self.batch, labels=self.batch).loss

    def step(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def weight(self) -> dict[str, int]:
        """Bytes of the trainable parameters, of the optimizer's state, and of the adapter's file."""
        state = [t for entry in self.optimizer.state.values() for t in entry.values() if torch.is_tensor(t)]
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            file = (Path(folder) / "adapter_model.safetensors").stat().st_size
        return {"parameters": size_of(self.trainable), "optimizer state": size_of(state), "file": file}


def size_of(tensors: list[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def interval(values: list[float]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the median."""
    resamples = 2000
    generator = torch.Generator().manual_seed(0)
    sample = torch.tensor(values)
    draws = sample[torch.randint(len(values), (resamples, len(values)), generator=generator)]
    found = sorted(median(draw) for draw in draws.tolist())
    return found[int(0.025 * resamples)], found[int(0.975 * resamples)]


def pairs_of(lora: Contestant, aslora: Contestant, count: int) -> list[tuple[float, float]]:
    """Seconds of (LoRA, ASLoRA), taken in turn."""
    times = []
    for number in range(count):
        if number % 2:
            second = aslora.step()
            times.append((lora.step(), second))
        else:
            first = lora.step()
            times.append((first, aslora.step()))
    return times


def file_limit(aslora: Contestant) -> int:
    """Property 5: 1.05 x (live A and B, and averages and counts while merges are pending) + 64 KiB."""
    tuner = aslora.model.base_model
    live = aslora.model.base_model.sharing_report().bytes["live"]
    for B in tuner.aslora_B["default"].values():
        if not B.finished:
            live += len(B.live_rows) * B.average[0].numel() * 4 + B.clock.numel() * 8
    return int(1.05 * live) + 64 * 1024


def require(condition: bool, what: str) -> None:
    """A check that must pass before any time is reported."""
    if not condition:
        raise SystemExit(f"check failed, nothing is reported: {what}")


def measure(model: Model, targets: list[str] | str, pairs: int) -> dict:
    """One row: checks, times, and weights."""
    base = model.make().requires_grad_(False)
    shared = {"r": model.r, "lora_alpha": 2 * model.r, "target_modules": targets, "task_type": "CAUSAL_LM"}
    vocabulary = base.config.vocab_size
    batch = torch.randint(vocabulary, model.batch, generator=torch.Generator().manual_seed(0))
    lora = Contestant(base, LoraConfig(**shared), batch)
    schedule = {"merge_start": WARM_UP + pairs, "merge_interval": 1, "num_merges": MERGES}
    aslora = Contestant(base, ASLoRAConfig(**shared, **schedule), batch)

    with torch.no_grad():
        plain, ours, theirs = base(input_ids=batch, labels=batch).loss, aslora.loss(), lora.loss()
    require(bool(plain.isfinite()), f"the loss of the base model is {plain.item()}")
    require(torch.equal(ours, theirs), f"at B = 0 the losses are {ours.item()} and {theirs.item()}")

    pairs_of(lora, aslora, WARM_UP)
    times = pairs_of(lora, aslora, pairs)
    pending = {"bytes": aslora.weight(), "limit": file_limit(aslora)}
    merge_times = [aslora.step() for _ in range(MERGES)]
    pairs_of(lora, aslora, 1)
    times_after = pairs_of(lora, aslora, max(2, pairs // 3))

    report = aslora.model.base_model.sharing_report()
    taken = {merge["step"] for merge in report.merges}
    require(taken == {WARM_UP + pairs + i for i in range(1, MERGES + 1)}, f"merges were taken at {sorted(taken)}")
    for contestant in (lora, aslora):
        require(bool(contestant.loss().isfinite()), "a loss is not finite after training")
    finished = {"bytes": aslora.weight(), "limit": file_limit(aslora)}
    for state in (pending, finished):
        require(state["bytes"]["file"] <= state["limit"], f"the file is larger than property 5 allows: {state}")

    ratios = [b / a for a, b in times]
    after = [b / a for a, b in times_after]
    step = median(b for _, b in times)
    return {
        "step ratio": median(ratios),
        "step ratio interval": interval(ratios),
        "step ratio after the last merge": median(after),
        "lora seconds": median(a for a, _ in times),
        "aslora seconds": step,
        "extra steps of a merge": (median(merge_times) - step) / step,
        "lora bytes": lora.weight(),
        "aslora bytes while merges are pending": pending["bytes"],
        "aslora file limit while merges are pending": pending["limit"],
        "aslora bytes at the end": finished["bytes"],
        "aslora file limit at the end": finished["limit"],
        "aslora live values": report.trainable_values,
    }


def line(row: dict) -> str:
    """One row as text, with what is above its limit marked."""
    low, high = row["step ratio interval"]
    size = {name: row[f"{name}"]["file"] for name in ("lora bytes", "aslora bytes at the end")}
    marks = [
        text
        for text, over in (
            (f"ABOVE {STEP_LIMIT}x", row["step ratio"] > STEP_LIMIT),
            ("MERGE ABOVE ONE STEP", row["extra steps of a merge"] > MERGE_LIMIT),
        )
        if over
    ]
    return (
        f"{row['model']:<16} {row['targets']:<10}  {row['step ratio']:.3f}x LoRA [{low:.3f}, {high:.3f}]  "
        f"{row['lora seconds'] * 1e3:7.1f} -> {row['aslora seconds'] * 1e3:7.1f} ms  "
        f"after merges {row['step ratio after the last merge']:.3f}x  "
        f"merge +{row['extra steps of a merge']:.2f} steps  "
        f"file {size['aslora bytes at the end'] / size['lora bytes']:.2f}x LoRA's  {' '.join(marks)}"
    ).rstrip()


def main(arguments: list[str] | None = None, models: list[Model] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few pairs, without the largest model; nothing is kept")
    parser.add_argument("--pairs", type=int, default=30, help="pairs of steps in a row (default: 30)")
    parser.add_argument("--rows", default="", help="only rows 'model: targets' that match this regular expression")
    parser.add_argument("--out", type=Path, default=RESULT, help="the result file")
    args = parser.parse_args(arguments)
    pairs = 6 if args.quick else args.pairs
    kept = None if args.quick else Rows(args.out)
    within = True
    for model in models or (QUICK if args.quick else MODELS):
        for name, targets in TARGETS.items():
            if not re.search(args.rows, f"{model.name}: {name}"):
                continue
            settings = json.loads(json.dumps({**asdict(model), "pairs": pairs}))  # as they are read back
            key = {"model": model.name, "targets": name, "settings": settings}
            row = kept.find(key) if kept else None
            if row is None:
                date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
                row = {**key, "date": date, **measure(model, targets, pairs)}
                if kept:
                    kept.add(row, environment())
            gc.collect()
            print(line(row), flush=True)
            within &= row["step ratio"] <= STEP_LIMIT and row["extra steps of a merge"] <= MERGE_LIMIT
    print(f"limits: {STEP_LIMIT}x and {MERGE_LIMIT:g} extra step: {'kept' if within else 'NOT kept'}")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
