"""How often a trained MEFT uses each neuron, and how many a micro-batch uses, recorded from SmolLM2-135M.

    python -m benchmarks.step_bound.record_routing --data DIR            # into benchmarks/results/routing_smollm2.npz
    python -m benchmarks.step_bound.record_routing --model FOLDER --data DIR --steps 2 --r 64 --passes 1 --out FILE

DIR holds `wikitext2/`. A short training run with MEFT on its validation text (AdamW, linear warm-up of 10 %, no decay)
moves keys, values and router away from their start; then, without training, micro-batches of its test text are run and
the picks counted: over all of them how often each neuron of each layer was picked, and per micro-batch shape |U| / r.
Text itself is not kept. `card_24gb/routing.py` draws ids for other shapes from the file.
"""

import argparse
import io
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import meft.routing.topk
from benchmarks.common.environment import environment
from meft import MEFTConfig
from peft_bridge import replace_file

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "benchmarks" / "results" / "routing_smollm2.npz"
# Batch x length: those of benchmarks.card_24gb, and one more to see how the union grows.
SHAPES = ((1, 256), (2, 256), (4, 256), (8, 256), (1, 2048), (16, 256))


class Counter:
    """Counts the picks that layers make one after the other in a pass."""

    def __init__(self, layers: int, r: int) -> None:
        self.counts = np.zeros((layers, r), dtype=np.int64)
        self.tokens = self.call = 0
        self.shares: list[float] = []  # |U| / r of each call
        self.picks = np.zeros(layers, dtype=np.int64)

    def add(self, neuron: torch.Tensor, tokens: int) -> None:
        """The picks of the next layer, int64 [n]."""
        layer = self.call % len(self.counts)
        found = torch.bincount(neuron, minlength=self.counts.shape[1]).numpy()
        self.counts[layer] += found
        self.picks[layer] += len(neuron)
        self.tokens += tokens if layer == 0 else 0
        self.shares.append(float((found > 0).mean()))
        self.call += 1


@contextmanager
def counted(counter: Counter) -> Iterator[None]:
    """Count what a model on the CPU picks inside of the block."""
    original = meft.routing.topk.select_neurons

    def counting(*args):
        selected = original(*args)
        ids = selected.ids
        counter.add(ids[ids >= 0], len(ids))
        return selected

    meft.routing.topk.select_neurons = counting
    try:
        yield
    finally:
        meft.routing.topk.select_neurons = original


def batches(ids: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """Consecutive windows, [n, batch, length]."""
    n = len(ids) // (batch * length)
    return ids[: n * batch * length].view(n, batch, length)


def train(model: torch.nn.Module, windows: torch.Tensor, steps: int, rate: float) -> list[float]:
    """Train; the losses."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, steps // 10)))
    model.train()
    losses = []
    for step in range(steps):
        window = windows[step % len(windows)]
        loss = model(input_ids=window, labels=window).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step + 1} of {steps}: loss {losses[-1]:.3f}", flush=True)
    return losses


def record(model: torch.nn.Module, ids: torch.Tensor, r: int, passes: int) -> tuple[Counter, dict[str, list[float]]]:
    """Counts over all passes, and of each shape |U| / r of each layer, as the mean over its passes."""
    model.eval()
    total: Counter | None = None
    shares = {}
    layers = len(model.base_model.adapted_ffns())
    for batch, length in SHAPES:
        counter = Counter(layers, r)
        windows = batches(ids, batch, length)
        some = windows[torch.linspace(0, len(windows) - 1, min(passes, len(windows))).round().long()]
        with torch.no_grad(), counted(counter):
            for window in some:
                model.model.model(input_ids=window, use_cache=False)  # no logits are needed
        shares[f"{batch}x{length}"] = [round(float(x), 4) for x in np.reshape(counter.shares, (-1, layers)).mean(0)]
        print(f"{batch}x{length}: |U| / r {np.mean(counter.shares):.3f} over {len(some)} passes", flush=True)
        if total is None:
            total = counter
        else:
            total.counts += counter.counts
            total.picks += counter.picks
            total.tokens += counter.tokens
    assert total is not None
    return total, shares


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds wikitext2/")
    parser.add_argument("--model", default=str(ROOT / ".cache" / "SmolLM2-135M-Instruct"), help="folder of the model")
    parser.add_argument("--r", type=int, default=6400)
    parser.add_argument("--steps", type=int, default=30, help="training steps of 2 x 256 tokens")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--passes", type=int, default=6, help="recorded micro-batches of each shape")
    parser.add_argument("--out", type=Path, default=RECORD)
    args = parser.parse_args(arguments)
    began = time.perf_counter()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    # Lines are long texts: the windows run over them.
    texts = [(args.data / "wikitext2" / f"{part}.txt").read_text(encoding="utf-8") for part in ("valid", "test")]
    need = max(2 * 256 * args.steps, max(b * n for b, n in SHAPES) * args.passes)
    trained_on, recorded_on = (
        tokenizer(text[: 8 * need], return_tensors="pt", verbose=False).input_ids[0] for text in texts
    )
    model = get_peft_model(model, MEFTConfig(r=args.r, task_type="CAUSAL_LM"))
    losses = train(model, batches(trained_on, 2, 256), args.steps, args.rate)
    config = model.peft_config["default"]
    counter, shares = record(model, recorded_on, args.r, args.passes)
    about = {
        "command": "python -m benchmarks.step_bound.record_routing --data ../shared/data",
        "date": date.today().isoformat(),
        "model": "SmolLM2-135M-Instruct", "text": "WikiText-2: validation to train, test to record",
        "r": args.r, "experts": config.experts, "probed": config.probed, "top_k": config.top_k,
        "steps": args.steps, "tokens_a_step": 512, "learning_rate": args.rate,
        "loss_first_and_last": [round(losses[0], 3), round(losses[-1], 3)],
        "recorded_tokens": counter.tokens,
        "picks_a_token": [round(float(x), 2) for x in counter.picks / counter.tokens],
        "union_share": shares,
        "seconds": round(time.perf_counter() - began),
        "environment": environment(),
    }  # fmt: skip
    out = io.BytesIO()
    # Sorted: which neuron is which does not matter to what moves, and sorted counts pack well.
    np.savez_compressed(
        out, counts=-np.sort(-counter.counts, axis=1).astype(np.uint32), about=np.array(json.dumps(about))
    )
    replace_file(args.out, out.getvalue())
    print(f"{args.out}: {len(out.getvalue()) / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
