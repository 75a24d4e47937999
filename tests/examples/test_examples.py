"""Every example runs: recipes with a tiny model and few steps, walk-throughs as they are."""

import json
import runpy
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedTokenizerFast, T5ForConditionalGeneration

from aslora_meft.cli import main
from tests.support.models import model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RECIPES = sorted((EXAMPLES / "recipes").glob("*.yaml"))
# Task -> a row of its data.
ROWS = {
    "sft": lambda i: {"prompt": f"{i} plus 1", "completion": f" {i + 1}"},
    "dpo": lambda i: {"prompt": f"{i} plus 1", "chosen": f" {i + 1}", "rejected": f" {i + 2}"},
    "reward": lambda i: {"prompt": f"{i} plus 1", "chosen": f" {i + 1}", "rejected": f" {i + 2}"},
    "classification": lambda i: {"text": str(i), "label": ("even", "odd")[i % 2]},
    "seq2seq": lambda i: {"source": f"{i} plus 1", "target": str(i + 1)},
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe(recipe, model_dir, tmp_path):
    fields = yaml.safe_load(recipe.read_text())
    task = fields.get("task", "sft")
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(json.dumps(ROWS[task](i)) for i in range(40)))
    if task in ("dpo", "reward"):
        pytest.importorskip("trl")
    if task == "seq2seq":
        model_dir = encoder_decoder(model_dir, tmp_path / "t5")
    if fields.get("load_in_4bit"):
        pytest.importorskip("bitsandbytes")
    words = ["--model", model_dir, "--data", data, "--output_dir", tmp_path / "out", "--max_length", 32]
    words += ["--max_steps", 4, "--gradient_accumulation_steps", 1, "--use_cpu", "true", "--disable_tqdm", "true"]
    words += ["--r", 64] if fields["method"] == "meft" else []
    assert main(["train", str(recipe), *map(str, words)]) == 0
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["peft_type"] == fields["method"].upper()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["after"]["loss"] != results["before"]["loss"]


def encoder_decoder(model_dir, folder):
    """A saved random T5 with the tokenizer of another model."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)
    special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    model(T5ForConditionalGeneration, vocab_size=len(tokenizer), **special).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_recipes_are_found():
    methods = {"aslora", "meft"}
    assert {path.stem.partition("_")[0] for path in RECIPES} == methods | {"dpo", "reward", "classification", "seq2seq"}


@pytest.fixture
def walk(model_dir, monkeypatch):
    """Runs a walk-through on the tiny model; gives its names."""

    def walk(name, **environment):
        for key, value in {"MODEL": model_dir, **environment}.items():
            monkeypatch.setenv(key, str(value))
        return runpy.run_path(str(EXAMPLES / name))

    return walk


def test_aslora_walkthrough(walk):
    names = walk("aslora_walkthrough.py", STEPS=20)
    assert names["losses"][-1] < names["losses"][0]
    assert names["report"].to_dict()["merges"]
    assert names["same"]
    assert names["difference"] < 1e-5
    assert names["sizes"]["aslora"] < names["sizes"]["lora"]


def test_meft_walkthrough(walk):
    names = walk("meft_walkthrough.py", STEPS=10, R=64)
    assert names["losses"][-1] < names["losses"][0]
    assert names["same"]
    assert names["difference"] < 1e-5
