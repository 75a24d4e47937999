"""Time of a training step of ASLoRA beside PEFT's LoRA with the same rank and targets, and what both weigh.

    python -m benchmarks.aslora_step                  # all rows, about 30 minutes on 2 cores; a rerun goes on
    python -m benchmarks.aslora_step --rows gate      # only those in which layers share x A^T, about 15 minutes
    python -m benchmarks.aslora_step --quick          # fewer rounds, without the largest model; keeps no result

Both methods run interleaved in one process over the same frozen weights: a round is one step (forward, backward,
optimizer) of each, in changing order; the row's number is the median of the rounds' ratios with a bootstrap interval.
While the rounds run, merges are pending, so that each step of ASLoRA includes its running averages. Then come merge
steps, and rounds after the last merge. Nothing is reported unless the checks of the same run have passed.

The rows "q,k,v,gate,up" have one A for all projections (`share_a="joint"`), so that those with one input share its
product with A. In their rounds the frozen base model takes a step too, below which no adapter can come, and the bytes
of activations at the peak of both methods are counted.
"""

import argparse
import datetime
import gc
import json
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig

from aslora import ASLoRAConfig
from benchmarks.aslora_step.contestants import ROOT, Base, Contestant, Model
from benchmarks.common.environment import environment
from peft_bridge import replace_file

RESULT = ROOT / "benchmarks" / "results" / "aslora_step.json"
JOINT = "q,k,v,gate,up"
TARGETS = {
    "q,v": ["q_proj", "v_proj"],
    "all-linear": "all-linear",
    JOINT: ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
}
STEP_LIMIT, MERGE_LIMIT = 1.03, 1.0  # times a step of LoRA; extra steps of ASLoRA
JOINT_LIMITS = {"SmolLM2-135M": 0.97, "Llama 12 x 1024": 0.99, "Llama 32 x 2048": 1.0}
JOINT_INTERVAL_LIMIT = 1.02  # of the upper end
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


MODELS = [
    Model("SmolLM2-135M", layers=30, width=576, r=8, batch=(1, 128)),
    Model("Llama 12 x 1024", layers=12, width=1024, r=8, batch=(2, 64), intermediate=2816),
    Model("Llama 32 x 2048", layers=32, width=2048, r=64, batch=(1, 64), intermediate=4096),
]
QUICK = MODELS[:2]
TOY = Model("toy", layers=4, width=32, r=4, batch=(1, 8), intermediate=48)  # for the test of this file


def interval(values: list[float]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the median."""
    resamples = 2000
    generator = torch.Generator().manual_seed(0)
    sample = torch.tensor(values)
    draws = sample[torch.randint(len(values), (resamples, len(values)), generator=generator)]
    found = sorted(median(draw) for draw in draws.tolist())
    return found[int(0.025 * resamples)], found[int(0.975 * resamples)]


def rounds_of(contestants: list[Contestant | Base], count: int) -> list[list[float]]:
    """Seconds of a step of each contestant, round by round; another one begins each time."""
    times = []
    for number in range(count):
        first = number % len(contestants)
        order = [*range(first, len(contestants)), *range(first)]
        seconds = {i: contestants[i].step() for i in order}
        times.append([seconds[i] for i in range(len(contestants))])
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


def measure(model: Model, name: str, pairs: int) -> dict:
    """One row: checks, times, and weights."""
    base = model.make().requires_grad_(False)
    shared = {"r": model.r, "lora_alpha": 2 * model.r, "target_modules": TARGETS[name], "task_type": "CAUSAL_LM"}
    vocabulary = base.config.vocab_size
    batch = torch.randint(vocabulary, model.batch, generator=torch.Generator().manual_seed(0))
    lora = Contestant(base, LoraConfig(**shared), batch)
    schedule = {"merge_start": WARM_UP + pairs, "merge_interval": 1, "num_merges": MERGES}
    share_a = "joint" if name == JOINT else "per_projection"
    aslora = Contestant(base, ASLoRAConfig(**shared, **schedule, share_a=share_a), batch)

    with torch.no_grad():
        plain, ours, theirs = base(input_ids=batch, labels=batch).loss, aslora.loss(), lora.loss()
    require(bool(plain.isfinite()), f"the loss of the base model is {plain.item()}")
    require(torch.equal(ours, theirs), f"at B = 0 the losses are {ours.item()} and {theirs.item()}")

    both = [lora, aslora]
    contestants = [*both, Base(base, batch)] if name == JOINT else both
    rounds_of(contestants, WARM_UP)
    times = rounds_of(contestants, pairs)
    with torch.no_grad():
        apart = aslora.loss()
    together = aslora.loss().detach()
    require(torch.equal(apart, together), f"with and without gradients the losses are {together} and {apart}")
    pending = {"bytes": aslora.weight(), "limit": file_limit(aslora)}
    merge_times = [aslora.step() for _ in range(MERGES)]
    rounds_of(both, 1)
    times_after = rounds_of(both, max(2, pairs // 3))

    report = aslora.model.base_model.sharing_report()
    taken = {merge["step"] for merge in report.merges}
    require(taken == {WARM_UP + pairs + i for i in range(1, MERGES + 1)}, f"merges were taken at {sorted(taken)}")
    for contestant in both:
        require(bool(contestant.loss().isfinite()), "a loss is not finite after training")
    finished = {"bytes": aslora.weight(), "limit": file_limit(aslora)}
    for state in (pending, finished):
        require(state["bytes"]["file"] <= state["limit"], f"the file is larger than property 5 allows: {state}")

    ratios = [ours / theirs for theirs, ours, *_ in times]
    step = median(ours for _, ours, *_ in times)
    row = {
        "step ratio": median(ratios),
        "step ratio interval": interval(ratios),
        "step ratio after the last merge": median(ours / theirs for theirs, ours in times_after),
        "lora seconds": median(theirs for theirs, *_ in times),
        "aslora seconds": step,
        "extra steps of a merge": (median(merge_times) - step) / step,
        "lora bytes": lora.weight(),
        "aslora bytes while merges are pending": pending["bytes"],
        "aslora file limit while merges are pending": pending["limit"],
        "aslora bytes at the end": finished["bytes"],
        "aslora file limit at the end": finished["limit"],
        "aslora live values": report.trainable_values,
    }
    if name == JOINT:
        floor = [alone / theirs for theirs, _, alone in times]
        row |= {"base ratio": median(floor), "base ratio interval": interval(floor)}
        row |= {f"{who} peak activations": c.peak_activations() for who, c in (("lora", lora), ("aslora", aslora))}
    return row


def above(row: dict) -> list[str]:
    """The limits that a row does not keep."""
    found = []
    limit = JOINT_LIMITS.get(row["model"], STEP_LIMIT) if row["targets"] == JOINT else STEP_LIMIT
    if row["step ratio"] > limit:
        found.append(f"ABOVE {limit}x")
    if row["extra steps of a merge"] > MERGE_LIMIT:
        found.append("MERGE ABOVE ONE STEP")
    if row["targets"] == JOINT and row["step ratio interval"][1] > JOINT_INTERVAL_LIMIT:
        found.append(f"INTERVAL REACHES ABOVE {JOINT_INTERVAL_LIMIT}x")
    if row["targets"] == JOINT and row["aslora peak activations"] > row["lora peak activations"]:
        found.append("MORE ACTIVATIONS THAN LORA")
    return found


def line(row: dict) -> str:
    """One row as text, with the limits that it does not keep."""
    low, high = row["step ratio interval"]
    size = {name: row[f"{name}"]["file"] for name in ("lora bytes", "aslora bytes at the end")}
    text = (
        f"{row['model']:<16} {row['targets']:<13}  {row['step ratio']:.3f}x LoRA [{low:.3f}, {high:.3f}]  "
        f"{row['lora seconds'] * 1e3:7.1f} -> {row['aslora seconds'] * 1e3:7.1f} ms  "
        f"after merges {row['step ratio after the last merge']:.3f}x  "
        f"merge +{row['extra steps of a merge']:.2f} steps  "
        f"file {size['aslora bytes at the end'] / size['lora bytes']:.2f}x LoRA's  "
    )
    if row["targets"] == JOINT:
        low, high = row["base ratio interval"]
        peak = row["aslora peak activations"] / row["lora peak activations"]
        text += f"base alone {row['base ratio']:.3f}x [{low:.3f}, {high:.3f}]  peak activations {peak:.3f}x  "
    return (text + " ".join(above(row))).rstrip()


def main(arguments: list[str] | None = None, models: list[Model] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few pairs, without the largest model; nothing is kept")
    parser.add_argument("--pairs", type=int, default=30, help="rounds of steps in a row (default: 30)")
    parser.add_argument("--rows", default="", help="only rows 'model: targets' that match this regular expression")
    parser.add_argument("--out", type=Path, default=RESULT, help="the result file")
    args = parser.parse_args(arguments)
    pairs = 6 if args.quick else args.pairs
    kept = None if args.quick else Rows(args.out)
    within = True
    for model in models or (QUICK if args.quick else MODELS):
        for name in TARGETS:
            if not re.search(args.rows, f"{model.name}: {name}"):
                continue
            settings = json.loads(json.dumps({**asdict(model), "pairs": pairs}))  # as they are read back
            key = {"model": model.name, "targets": name, "settings": settings}
            row = kept.find(key) if kept else None
            if row is None:
                date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
                row = {**key, "date": date, **measure(model, name, pairs)}
                if kept:
                    kept.add(row, environment())
            gc.collect()
            print(line(row), flush=True)
            within &= not above(row)
    print(f"limits: {'kept' if within else 'NOT kept'}")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
