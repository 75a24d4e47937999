"""ASLoRA adapters exported as LoRA with tokenizer and card, and merged into a plain model."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from aslora import ASLoRAConfig
from aslora_meft.export.aslora_lora import export_lora
from aslora_meft.export.aslora_merged import export_merged
from tests.support.exported_models import IDS, logits, save_base
from tests.support.processes import run_code


def save_adapter(base, folder, seed=0, change=None, **fields):
    """Trained so far that layers share; returns the model."""
    torch.manual_seed(seed)
    fields = {
        "r": 4,
        "lora_alpha": 8,
        "merge_start": 1,
        "merge_interval": 1,
        "num_merges": 1,
        "task_type": "CAUSAL_LM",
    } | fields
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), ASLoRAConfig(**fields))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return model.eval()


PLAIN = """
import sys
for name in ("adapter_kernels", "aslora", "aslora_meft", "meft", "peft", "peft_bridge"):
    sys.modules[name] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/merged").eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.load(sys.argv[1] + "/ids.pt")).logits, sys.argv[1] + "/logits.pt")
"""


def test_a_merged_model_is_a_plain_one(tmp_path):
    model = save_adapter(save_base(tmp_path / "base"), tmp_path / "adapter", target_modules="all-linear")
    export_merged([tmp_path / "adapter"], tmp_path / "merged")
    torch.save(IDS, tmp_path / "ids.pt")
    run_code(PLAIN, tmp_path, bare=True)
    expected = logits(model)
    assert (torch.load(tmp_path / "logits.pt") - expected).abs().max() < 1e-5
    with model.disable_adapter():
        assert (logits(model) - expected).abs().max() > 0.01
    merged = model.merge_and_unload().state_dict()
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert tensors.keys() == load_file(tmp_path / "base" / "model.safetensors").keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, merged[name]), name
    base, written = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("base", "merged"))
    assert base == written


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen2"])
def test_other_families_keep_the_names_of_their_files(tmp_path, family):
    fields = {"target_modules": "all-linear", "fan_in_fan_out": family == "gpt2"}
    model = save_adapter(save_base(tmp_path / "base", family), tmp_path / "adapter", **fields)
    export_merged([tmp_path / "adapter"], tmp_path / "merged")
    base, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    assert base.keys() == merged.keys()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert (logits(loaded) - logits(model)).abs().max() < 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_what_was_trained_whole_goes_along(tmp_path, tied):
    base = save_base(tmp_path / "base", "qwen2", tie_word_embeddings=tied)
    fields = {"modules_to_save": ["lm_head"], "bias": "all", "target_modules": ["q_proj", "down_proj"]}
    model = save_adapter(base, tmp_path / "adapter", **fields)
    export_merged([tmp_path / "adapter"], tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert (logits(loaded) - logits(model)).abs().max() < 1e-5
    bias = "model.layers.0.self_attn.q_proj.bias"
    assert not torch.equal(loaded.state_dict()[bias], load_file(base / "model.safetensors")[bias])


def test_several_adapters_merge_as_their_sum(tmp_path):
    base = save_base(tmp_path / "base")
    for number, targets in enumerate((["q_proj", "v_proj"], ["v_proj", "up_proj"])):
        save_adapter(base, tmp_path / str(number), seed=number, target_modules=targets)
    export_merged([tmp_path / "0", tmp_path / "1"], tmp_path / "merged")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "0", adapter_name="0")
    model.load_adapter(tmp_path / "1", "1")
    model.base_model.set_adapter(["0", "1"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert (logits(loaded) - logits(model.eval())).abs().max() < 1e-5


def test_sums_are_rounded_once(tmp_path):
    """In bfloat16: the float32 sum, rounded."""
    save_adapter(save_base(tmp_path / "base"), tmp_path / "adapter", target_modules=["q_proj"])
    export_merged([tmp_path / "adapter"], tmp_path / "wide")
    export_merged([tmp_path / "adapter"], tmp_path / "narrow", dtype="bfloat16")
    wide, narrow = (load_file(tmp_path / name / "model.safetensors") for name in ("wide", "narrow"))
    assert all(torch.equal(tensor, wide[name].bfloat16()) for name, tensor in narrow.items())
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["dtype"] == "bfloat16"


def test_several_adapters_become_loras_beside_each_other(tmp_path, tokenizer):
    base = save_base(tmp_path / "base")
    models = [save_adapter(base, tmp_path / name, seed=i, target_modules=["q_proj"]) for i, name in enumerate("ab")]
    tokenizer.save_pretrained(tmp_path / "a")
    export_lora([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a", "b"}
    for name, model in zip("ab", models, strict=True):
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out" / name)
        assert type(loaded.peft_config["default"]) is LoraConfig
        assert torch.equal(logits(loaded.eval()), logits(model))
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "a").get_vocab() == tokenizer.get_vocab()
    card = (tmp_path / "out" / "b" / "README.md").read_text()
    assert "lora_alpha | 8" in card
    assert "so there is none here" in card  # neither adapter nor base model has a tokenizer
    assert str(tmp_path) not in card


def test_a_lora_needs_no_base_model(tmp_path):
    save_adapter(save_base(tmp_path / "base"), tmp_path / "adapter", target_modules=["q_proj"])
    shutil.rmtree(tmp_path / "base")
    export_lora([tmp_path / "adapter"], tmp_path / "out")
    with pytest.raises(ValueError, match=r"base_model_name_or_path=.* is no folder here"):
        export_merged([tmp_path / "adapter"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_what_does_not_go_together_is_refused(tmp_path):
    first, second = save_base(tmp_path / "first"), save_base(tmp_path / "second")
    for name, base in (("a", first), ("b", second), ("c/a", first)):
        save_adapter(base, tmp_path / name, modules_to_save=["lm_head"], target_modules=["q_proj"])
    for adapters, why in ((("a", "b"), "have two base models"), (("a", "c/a"), "trained 'lm_head.weight' whole")):
        with pytest.raises(ValueError, match=why):
            export_merged([tmp_path / name for name in adapters], tmp_path / "out")
    with pytest.raises(ValueError, match="Two adapter folders are called 'a'"):
        export_lora([tmp_path / "a", tmp_path / "c/a"], tmp_path / "out")
    other = save_base(tmp_path / "other", hidden_size=64)
    shutil.rmtree(first)
    shutil.copytree(other, first)
    with pytest.raises(ValueError, match=r"saved for another base model|by its config\.json"):
        export_merged([tmp_path / "a"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
