"""The exported LoRA is exact, needs nothing of ours, and appears whole or not at all."""

import os

import pytest
import torch
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from aslora import ASLoRAConfig, export_to_lora
from tests.support.models import llama
from tests.support.models import model as model_of
from tests.support.processes import run_code
from tests.support.training import train, trainable

WEIGHTS = "adapter_model.safetensors"
BATCH = torch.arange(16).view(2, 8)


def biased():
    return llama(4, attention_bias=True)


def gpt2():
    """Conv1D layers, and biases."""
    return model_of(GPT2LMHeadModel, n_positions=16, n_layer=4)


CASES = {
    "plain": (biased, {"target_modules": ["q_proj", "v_proj"]}),
    "default targets": (biased, {}),
    "all-linear": (biased, {"target_modules": "all-linear"}),
    "regular expression": (biased, {"target_modules": r".*\.(q|o)_proj"}),
    "Conv1D": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "rsLoRA": (biased, {"target_modules": ["q_proj"], "use_rslora": True}),
    "joint A": (biased, {"target_modules": ["q_proj", "v_proj", "down_proj"], "share_a": "joint"}),
    "some layers": (biased, {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2, 3]}),
    "excluded": (biased, {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.1\..*"}),
    "modules_to_save": (biased, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "trained tokens": (biased, {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 5]}}),
    "tied tokens": (
        lambda: llama(4, tie_word_embeddings=True),
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5], "ensure_weight_tying": True},
    ),
    "bias": (biased, {"target_modules": ["q_proj", "v_proj"], "bias": "aslora_only"}),
    "all biases": (gpt2, {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "dropout": (biased, {"target_modules": ["q_proj"], "aslora_dropout": 0.1}),
    "bf16 base": (lambda: biased().to(torch.bfloat16), {"target_modules": ["q_proj", "v_proj"]}),
}


def train_and_save(make_base, fields, folder, steps=4):
    """A few steps with merges in them; of the adapter of four layers two rows stay."""
    config = ASLoRAConfig(
        r=4, lora_alpha=8, merge_start=1, merge_interval=1, num_merges=2, task_type="CAUSAL_LM", **fields
    )
    model = get_peft_model(make_base(), config)
    train(model, [BATCH] * steps, torch.optim.AdamW(trainable(model), lr=5e-2))
    model.save_pretrained(folder)
    model.eval()
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Case -> (trained model, ASLoRA folder, LoRA folder)."""
    made = {}
    for number, (case, (make_base, fields)) in enumerate(CASES.items()):
        folder = tmp_path_factory.mktemp(f"case{number}")
        model = train_and_save(make_base, fields, folder / "aslora")
        export_to_lora(folder / "aslora", folder / "lora")
        made[case] = (model, folder / "aslora", folder / "lora")
    return made


def adapted_layers(model):
    from aslora.layer import ASLoRALayer

    return {name: layer for name, layer in model.named_modules() if isinstance(layer, ASLoRALayer)}


@pytest.mark.parametrize("case", CASES)
def test_a_and_b_of_each_layer_are_bit_equal(exported, case):
    model, _, folder = exported[case]
    lora = load_file(folder / WEIGHTS)
    layers = adapted_layers(model)
    assert layers
    for name, layer in layers.items():
        A, B = layer.factors("default", torch.device("cpu"))
        assert torch.equal(lora.pop(f"{name}.lora_A.weight"), A)
        assert torch.equal(lora.pop(f"{name}.lora_B.weight"), B)
        assert B.abs().max() > 0
    assert not [name for name in lora if "lora" in name]
    assert any(B.merges_taken for B in model.base_model.aslora_B["default"].values())


@pytest.mark.parametrize("case", CASES)
def test_the_loaded_lora_has_the_same_logits(exported, case):
    model, _, folder = exported[case]
    with torch.no_grad():
        base = CASES[case][0]().eval()
        plain = base(BATCH).logits
        loaded = PeftModel.from_pretrained(base, folder).eval()
        assert type(loaded.peft_config["default"]) is LoraConfig
        ours, theirs = model(BATCH).logits, loaded(BATCH).logits
    assert torch.equal(ours, theirs)
    assert (ours - plain).abs().max() > 1e-3  # the adapter does something


STOCK = """
import sys, torch
from pathlib import Path
from peft import AutoPeftModelForCausalLM
folder = Path(sys.argv[1])
model = AutoPeftModelForCausalLM.from_pretrained(folder / "lora").eval()
with torch.no_grad():
    logits = model(torch.arange(16).view(2, 8)).logits
ours = [name for name in sys.modules if name.split(".")[0] in ("aslora", "peft_bridge", "aslora_meft")]
assert not ours, ours
torch.save(logits, folder / "logits.pt")
"""


def test_a_process_with_stock_peft_gives_the_same_logits(tmp_path):
    biased().save_pretrained(tmp_path / "base")
    fields = {"target_modules": ["q_proj", "v_proj"]}
    model = train_and_save(lambda: LlamaForCausalLM.from_pretrained(tmp_path / "base"), fields, tmp_path / "aslora")
    export_to_lora(tmp_path / "aslora", tmp_path / "lora")
    run_code(STOCK, tmp_path, bare=True)
    with torch.no_grad():
        expected = model(BATCH).logits
    # The other process may have another number of threads, and so another order of sums; no more than that.
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-5, atol=1e-6)


def test_pefts_own_conversion_works():
    """PEFT's way is an SVD for each layer; at the full rank it is exact but for rounding."""
    torch.manual_seed(0)
    config = ASLoRAConfig(r=4, target_modules=["q_proj", "v_proj"], init_weights=False)
    model = get_peft_model(biased().double(), config).eval()
    with torch.no_grad():
        expected = model(BATCH).logits
    lora_config, state_dict = convert_to_lora(model, rank=4)
    lora = get_peft_model(biased().double(), lora_config).eval()
    assert not set_peft_model_state_dict(lora, state_dict).unexpected_keys
    with torch.no_grad():
        torch.testing.assert_close(lora(BATCH).logits, expected, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------- what is refused, what a kill leaves


def test_a_folder_with_something_in_it_is_left_alone(exported, tmp_path):
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty"):
        export_to_lora(exported["plain"][1], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["keep.txt"]


def test_a_folder_of_another_method_is_refused(exported, tmp_path):
    with pytest.raises(ValueError, match="type LORA, not ASLORA"):
        export_to_lora(exported["plain"][2], tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds no adapter_config\.json"):
        export_to_lora(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
import safetensors.torch
from aslora import export_to_lora
from aslora.files import export
folder = Path(sys.argv[1])

def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def half_written(tensors, path, **kwargs):
    Path(path).write_bytes(safetensors.torch.save(tensors)[:1000])
    kill()

POINTS = {
    "before": (export, "save_file", kill),
    "half of the tensors": (export, "save_file", half_written),
    "before the config": (export.LoraConfig, "save_pretrained", kill),
    "before the rename": (os, "replace", kill),
}
for name, (owner, attribute, killer) in POINTS.items():
    child = os.fork()
    if child == 0:
        setattr(owner, attribute, killer)
        export_to_lora(folder / "aslora", folder / name)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (name, status)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_point_leaves_nothing_half_written(tmp_path):
    train_and_save(*CASES["plain"], tmp_path / "aslora")
    run_code(KILLED, tmp_path)
    for name in ("before", "half of the tensors", "before the config", "before the rename"):
        assert not (tmp_path / name).exists(), name
        export_to_lora(tmp_path / "aslora", tmp_path / name)  # and it works when it is done again
        assert {path.name for path in (tmp_path / name).iterdir()} >= {WEIGHTS, "adapter_config.json"}
