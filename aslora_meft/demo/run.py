"""What ``make demo`` runs: SmolLM2-135M learns some King James Bible, and the result is exported and checked.

With ASLoRA the export is a LoRA that stock PEFT serves, with MEFT it is a model folder that transformers serves; a
process without this package loads it, gives its logits and goes on with a prompt. A report of the run is the end.
``python -m aslora_meft.demo MODEL [aslora|meft]`` takes the folder that :mod:`aslora_meft.demo.smollm2` wrote; all
it makes lies in ``demo-output/``, which each run replaces.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from aslora_meft.arguments.groups import parse_train
from aslora_meft.cli import main as aslora_meft
from aslora_meft.demo import stock_logits
from aslora_meft.demo.text import HELD_OUT, LEARNT, bible
from aslora_meft.report.command import write_report
from aslora_meft.train import train

OUTPUT = Path("demo-output")
WEIGHTS = "adapter_model.safetensors"
PROMPT = "And it came to pass in those days, that"
STEPS, BATCH, LENGTH = 20, 4, 128


def main(model: str, method: str = "aslora", extra: Sequence[str] = ()) -> int:
    """Train, compare, export and check; ``extra`` are further words of ``aslora-meft train``.

    Returns:
        0, or 1 if the export does not give the logits of the tuned model.
    """
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir()
    text = bible()
    learnt, held_out = OUTPUT / "learnt.txt", OUTPUT / "held_out.txt"
    learnt.write_text(text[LEARNT], encoding="utf-8")
    held_out.write_text(text[HELD_OUT], encoding="utf-8")
    adapter = OUTPUT / "adapter"

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    said_before = _generate(base, tokenizer)
    del base

    words = ["--model", model, "--method", method, "--data", str(learnt), "--eval_data", str(held_out)]
    words += ["--max_length", str(LENGTH), "--per_device_train_batch_size", str(BATCH), "--max_steps", str(STEPS)]
    words += ["--save_strategy", "no", "--logging_steps", "2", "--output_dir", str(adapter), *extra]
    print("$ aslora-meft train", *words, flush=True)
    tuned: Any = train(parse_train(words)).model.eval().cpu()  # where the base model was asked, and will be compared

    print(f"\nbefore: {said_before}\nafter:  {_generate(tuned, tokenizer)}")

    form = "lora" if method == "aslora" else "model"
    exported = OUTPUT / form
    words = ["export", str(adapter), "--to", form, str(exported)]
    print("\n$ aslora-meft", *words, flush=True)
    if code := aslora_meft(words):
        return code
    ids = tokenizer(text[HELD_OUT])["input_ids"][:LENGTH]
    if method == "meft":
        equal = _same_logits(str(exported), tuned, None, ids)
    else:
        _print_sizes(tuned, adapter, exported)
        equal = _same_logits(model, tuned, exported, ids)
    print(f"\n$ aslora-meft report {adapter}\nReport: {write_report([str(adapter)])[0].resolve()}")
    return 0 if equal else 1


def _print_sizes(tuned: Any, adapter: Path, exported: Path) -> None:
    values = tuned.base_model.sharing_report().trainable_values
    print(f"\n{'':<22}{'trained values':>16}{'file, bytes':>14}")
    for name, count, folder in (
        ("ASLoRA r 8, at start", values["start"], None),
        ("ASLoRA r 8, at the end", values["now"], adapter),
        ("LoRA r 8", _values(exported / WEIGHTS), exported),
    ):
        size = f"{(folder / WEIGHTS).stat().st_size:,}" if folder else ""
        print(f"{name:<22}{count:>16,}{size:>14}")


def _generate(model: Any, tokenizer: Any) -> str:
    prompt = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    ids = model.generate(**prompt, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return " ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split())


def _values(file: Path) -> int:
    return sum(tensor.numel() for tensor in load_file(file).values())


def _same_logits(model: str, tuned: Any, adapter: Path | None, ids: list[int]) -> bool:
    """Whether a fresh process without this package computes what ``tuned`` does, up to float32 rounding.

    ``model`` is a base model beside a LoRA ``adapter``, or where there is none an exported model.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder, "logits.safetensors"))
        script = [sys.executable, "-I", stock_logits.__file__, model, str(adapter or "-"), json.dumps(ids), out, PROMPT]
        said = subprocess.run(
            script, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        ).stdout.strip()
        stock = load_file(out)["logits"]
    what = "LoRA in stock PEFT" if adapter else "model in transformers"
    with torch.no_grad():
        ours = tuned(input_ids=torch.tensor([ids])).logits[0]
    difference = (ours - stock).abs().max().item()
    # Sums of some hundred float32 products, 30 layers deep.
    tokens = torch.isclose(ours, stock, rtol=1e-4, atol=1e-4).all(-1)
    largest = ours.abs().max().item()
    equal, where = bool(tokens.all()), ""
    if not adapter and not equal:
        # Rounding may turn a tie of two neurons round: MEFT then uses another one for a token, which later ones see.
        equal = tokens.float().mean().item() >= 0.9 and difference <= 1e-3 * largest
        where = f" at {int(tokens.sum())} of {len(tokens)} tokens (others: another neuron may have won a tie)"
    print(
        f"\nThe exported {what}, in a process without this package: logits {'equal' if equal else 'DIFFER'}"
        f"{where if equal else ''}, largest difference {difference:.2g} (largest logit {largest:.3g})\nIt says:  {said}"
    )
    return equal
