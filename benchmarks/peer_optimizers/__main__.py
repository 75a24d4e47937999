"""MEFT's step beside what other libraries offer for as many values, on a CPU.

    python -m benchmarks.peer_optimizers            # all rows
    python -m benchmarks.peer_optimizers --quick    # small ones, few rounds; keeps no result

Three rows. A layer: MEFT's adapter (r 6400, d 4096, 512 tokens by Zipf's law) beside a dense ReLU adapter as large with
torch's fused AdamW, bitsandbytes' 8-bit and paged AdamW, DeepSpeed's CPUAdam and torchao's CPUOffloadOptimizer. The
value side alone, with the picks given: MEFT's kernels and row AdamW beside `torch.nn.EmbeddingBag` with SparseAdam and
FBGEMM's table-batched embeddings (it has no Adam on a CPU; its rules are cheaper, so only speed and memory
compare). SmolLM2-135M: whole training steps, LoRA too. What is not installed, or does not run on a CPU, is named in the
result.

Contestants run in turn within a round, in a new order each round; a ratio is the median of the rounds' ratios, with a
bootstrap interval. Nothing is reported unless the checks of the same run have passed.
"""

import argparse
import datetime
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from adapter_kernels.runtime.host_threads import VARIABLE
from benchmarks.common.environment import environment, installed
from benchmarks.peer_optimizers import layer, value_side, whole_model
from peft_bridge import replace_file

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "peer_optimizers.json"
MODEL = ROOT / ".cache" / "SmolLM2-135M-Instruct"
PARTS = ("layer", "values", "model")
PACKAGES = ("bitsandbytes", "deepspeed", "torchao", "fbgemm-gpu-cpu")


def lines(part: str, row: dict) -> list[str]:
    """A row as text."""
    said = [f"{part}: {', '.join(f'{k} {v}' for k, v in row.items() if not isinstance(v, dict))}"]
    for name, one in row["steps"].items():
        low, high = one["interval"]
        ms = " + ".join(f"{value:.0f}" for value in one["ms"].values())
        said.append(
            f"  {name:<60} {one['times as long as MEFT']:6.2f}x [{low:.2f}, {high:.2f}]  {ms} ms  "
            f"{one['MiB kept']:.0f} MiB"
        )
    return said + [f"  {name:<60} {why}" for name, why in row["not run"].items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small rows, few rounds; keeps no result")
    parser.add_argument(
        "--parts", nargs="+", choices=("layer", "values", "model"), default=["layer", "values", "model"]
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of SmolLM2-135M, as `make demo` unpacks it")
    parser.add_argument("--out", type=Path, default=RESULT, help="file of the result")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))
    os.environ.setdefault(VARIABLE, str(torch.get_num_threads()))  # all contestants on as many
    quick, named = args.quick, {name: installed(name) for name in PACKAGES}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    parts = {
        "layer": lambda: layer.measure(1024 if quick else 6400, 128 if quick else 512, 3 if quick else 15),
        "values": lambda: value_side.measure(
            1024 if quick else 6400, 512 if quick else 4096, 128 if quick else 512, 64, 3 if quick else 15
        ),
        "model": lambda: whole_model.measure(
            args.model, 512 if quick else 6400, (1, 32) if quick else (2, 256), 2 if quick else 4
        ),
    }
    rows = {} if quick or not args.out.exists() else json.loads(args.out.read_text())["rows"]  # of other parts
    for part in args.parts:
        began = time.perf_counter()
        rows[part] = parts[part]()
        print("\n".join(lines(part, rows[part])), flush=True)
        if quick:
            continue
        rows[part] |= {
            "date": datetime.date.today().isoformat(),
            "seconds": round(time.perf_counter() - began),
            "environment": environment() | named | {"load at the start": load},
        }
        result = {"command": "python -m benchmarks.peer_optimizers", "rows": rows}
        replace_file(args.out, (json.dumps(result, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
