"""Would it pay to update rows before the norm of all gradients is known? Bounds, and a record of norms.

    python -m benchmarks.step_bound.clipping                     # only the bounds anew: seconds
    python -m benchmarks.step_bound.clipping --record DIR        # the record too: half an hour on 2 cores, 5 GiB

Clipping makes every update wait for the norm. A way around: update rows as their gradients land, as if the norm were
below its limit, keep what they were, and where the guess was wrong put it back and update again. The bounds are those
of `meft.cost.step_time` for Llama-2-7B, r 6400, 2 x 256 tokens, `stream`, with what keeping and undoing moves in the
host's memory beside the update. Nothing is measured but the record: SmolLM2-135M with MEFT r 6400, clipped at 1.0, on
texts of DIR/wikitext2 and DIR/gsm8k; in how many steps the norm exceeded the limit.
"""

import argparse
import datetime
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from aslora_meft.planner.rates import ceilings
from benchmarks.common.environment import environment
from benchmarks.step_bound.__main__ import CARDS, FFN, HEAD, LAYERS, MARK, ROOT, D
from benchmarks.step_bound.record_routing import batches
from meft import MEFTConfig
from meft.cost.host_bytes import HostBytes
from meft.cost.memory import AdapterShape, Plan, Work
from meft.cost.step_time import BaseModel, step_time
from peft_bridge import replace_file

RESULT = ROOT / "benchmarks" / "results" / "clipping.json"
R, TOKENS, LENGTH = 6400, 512, 256
SHARES = (0.26, 0.44, 0.465)  # the paper's |U| / r, that of the recorded routing, that of the recorded trace
STATES = {"float32": ("float32", "float32"), "narrow": ("bfloat16", "rowwise")}  # master_dtype, moments
LIMIT, RATE = 1.0, 1e-3


class Undoing(HostBytes):
    """What the host moves where rows are updated before the norm is known."""

    def __init__(self, plan: Plan, more: float) -> None:
        super().__init__(plan)
        object.__setattr__(self, "more", more)

    def updated(self) -> int:
        return round(super().updated() + self.more * self.stepped_values)

    @property
    def stepped_values(self) -> int:
        return 2 * self.stepped * self.plan.shape.d


def bound(card: str, share: float, states: str) -> dict[str, object]:
    """One cell: steps that wait, and those that do not, as a multiple of the speed of waiting."""
    master, moments = STATES[states]
    config = MEFTConfig(r=R, master_dtype=master, row_optimizer={"moments": moments})
    shape = AdapterShape.of(config, d=D, layers=LAYERS, base_dtype=torch.bfloat16)
    plan = Plan(shape, Work(TOKENS, round(share * R)), "stream")
    base, at = BaseModel(LENGTH, 4 * D * D, FFN, D, HEAD), ceilings(card)
    update = HostBytes(plan).updated() / Undoing(plan, 0).stepped_values
    kept = 4.0 if states == "narrow" else 12.0  # what the update overwrites: masters and both moments

    def seconds(clipping: bool, more: float) -> float:
        return step_time(plan, base, at, clipping=clipping, moved=Undoing(plan, more)).seconds

    waiting = seconds(True, 0)
    # Right: each kept value is written once. Wrong: it is read and written back too, and the update is done again.
    right, wrong, free = seconds(False, kept), seconds(True, 3 * kept + update), seconds(False, 0)
    return {
        "kind": MARK, "card": card, "|U|/r": share, "states": states,
        "bytes of the update": round(update, 1), "bytes kept": kept,
        "seconds at least, waiting": round(waiting, 4),
        "times as fast, every guess right": round(waiting / right, 3),
        "times as fast, every guess wrong": round(waiting / wrong, 3),
        "times as fast, if keeping were free": round(waiting / free, 3),
    }  # fmt: skip


def texts(folder: Path) -> dict[str, str]:
    """Long texts to train on."""
    lines = (folder / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:2000]
    solved = (json.loads(line) for line in lines)
    return {
        "WikiText-2": (folder / "wikitext2" / "valid.txt").read_text(encoding="utf-8")[:400_000],
        "GSM8K": "\n\n".join(f"{one['question']}\n{one['answer']}" for one in solved)[:400_000],
    }


def recorded(model_folder: Path, text: str, steps: int, r: int) -> dict[str, object]:
    """The norms of a clipped training run."""
    torch.manual_seed(0)
    began = time.perf_counter()
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    windows = batches(tokenizer(text, return_tensors="pt", verbose=False).input_ids[0], 2, 256)
    model = get_peft_model(base, MEFTConfig(r=r, task_type="CAUSAL_LM"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, steps // 10)))
    norms, losses = [], []
    for step in range(steps):
        window = windows[step % len(windows)]
        loss = model(input_ids=window, labels=window).loss
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, LIMIT)))
        losses.append(float(loss.detach()))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"step {step + 1} of {steps}: loss {losses[-1]:.3f}, norm {norms[-1]:.3f}", flush=True)
    above = [norm > LIMIT for norm in norms]
    return {
        "r": r, "steps": steps, "tokens a step": 512, "learning rate": RATE, "limit": LIMIT,
        "steps above the limit": sum(above), "of the second half": sum(above[steps // 2 :]),
        "norms": [round(norm, 3) for norm in norms],
        "loss, first and last": [round(losses[0], 3), round(losses[-1], 3)],
        "seconds": round(time.perf_counter() - began),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, metavar="DIR", help="folder that holds wikitext2/ and gsm8k/")
    parser.add_argument("--model", type=Path, default=ROOT / ".cache" / "SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--r", type=int, default=R)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args(arguments)
    held = json.loads(args.out.read_text()) if args.out.exists() else {}
    result = {
        "command": "python -m benchmarks.step_bound.clipping --record ../shared/data",
        "bounds": [bound(card, share, states) for card in CARDS for share in SHARES for states in STATES],
        "record": held.get("record", "not measured"),
    }
    for row in result["bounds"]:
        print(", ".join(f"{key} {value}" for key, value in row.items()))
    if args.record:
        runs = {name: recorded(args.model, text, args.steps, args.r) for name, text in texts(args.record).items()}
        result["record"] = {"date": datetime.date.today().isoformat(), "environment": environment(), "runs": runs}
    replace_file(args.out, (json.dumps(result, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
