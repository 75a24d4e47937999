"""How an exported MEFT model reads its keys on a CPU: the time of each form, and the one that the model takes.

    python -m benchmarks.export_forms --out benchmarks/results/export_forms.md

Numbers of tokens by r and hidden size; all forms give equal picks (tests/aslora_meft/export/test_modeling_file.py).
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from aslora_meft.export import modeling_meft_llama as modeling
from benchmarks.common.environment import environment
from meft.num_experts import default_num_experts

SIZES = ((1024, 576), (4096, 576), (1024, 2048), (6400, 2048))  # r, d
TOKENS = (1, 4, 8, 16, 64, 128, 256, 512)
PROBED = 8
FORMS = (modeling.gathered, modeling.dense, modeling.grouped)
LARGEST = 2**25  # values that gathered keys may take


def milliseconds(forms: list, repeats: int) -> list[float]:
    """The fastest of some runs of each form, taken in turn so that a busy moment hits all of them."""
    best = [float("inf")] * len(forms)
    for number in range(repeats + 1):
        for i, form in enumerate(forms):
            began = time.perf_counter()
            form()
            if number:  # the first one warms up
                best[i] = min(best[i], 1e3 * (time.perf_counter() - began))
    return best


def measure(r: int, d: int, tokens: int, dtype: torch.dtype, repeats: int) -> tuple[list[float], int]:
    """Milliseconds of each form (nan: too large), and which of them the model takes."""
    E = default_num_experts(r)
    keys = torch.randn(E, r // E, d).to(dtype)
    x = torch.randn(tokens, d).to(dtype)
    experts = torch.rand(tokens, E).topk(PROBED).indices.sort().values
    names = [form for form in FORMS if form is not modeling.gathered or experts.numel() * keys[0].numel() <= LARGEST]
    times = dict(zip(names, milliseconds([lambda f=f: f(x, keys, experts) for f in names], repeats), strict=True))
    taken = []
    originals = {form.__name__: form for form in FORMS}
    for name, form in originals.items():
        setattr(modeling, name, lambda *args, form=form: taken.append(form) or form(*args))
    try:
        modeling.dots_of_experts(x, keys, experts)
    finally:
        for name, form in originals.items():
            setattr(modeling, name, form)
    return [times.get(form, float("nan")) for form in FORMS], FORMS.index(taken[0])


def main(arguments: list[str] | None = None) -> int:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs=2, action="append", metavar=("R", "D"))
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    rows, lost = [], []
    try:
        for r, d in args.sizes or SIZES:
            for dtype in (torch.float32, torch.bfloat16):
                for tokens in args.tokens:
                    times, taken = measure(r, d, tokens, dtype, args.repeats)
                    fastest = min(t for t in times if t == t)
                    lost.append(times[taken] / fastest)
                    cells = ["" if t != t else f"{t:.2f}" for t in times]
                    cells[taken] = f"**{cells[taken]}**"
                    rows.append(f"| {r} | {d} | {str(dtype)[6:]} | {tokens} | {' | '.join(cells)} | {lost[-1]:.2f} |")
                    print(rows[-1], flush=True)
    finally:
        torch.set_num_threads(threads)
    worst, mean = max(lost), sum(lost) / len(lost)
    text = [
        "# Forms of reading keys in an exported MEFT model, on a CPU",
        "",
        f"`python -m benchmarks.export_forms`: milliseconds, the fastest of {args.repeats}, threads:",
        f"{args.threads}, {PROBED} experts a token. Bold: the form that the model takes. Last column: its time over",
        f"that of the fastest form; on average {mean:.2f}, at worst {worst:.2f}. Empty: the gathered keys would take",
        "more than 134 MB. Other programs shared the cores, so single rows are noisy.",
        "",
        f"`{environment()}`",
        "",
        "| r | d | dtype | tokens | gathered | dense | grouped | taken / fastest |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
        "",
    ]
    print("\n".join(text))
    if args.out:
        args.out.write_text("\n".join(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
