import copy

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaForCausalLM

from aslora import ASLoRAConfig
from aslora_meft.adapter import adapter_config, add_adapter, load_model, load_tokenizer
from aslora_meft.arguments import AdapterArguments, ModelArguments, NeuronArguments, SharingArguments
from aslora_meft.errors import UsageError

CPU = torch.device("cpu")


def test_lora_config():
    adapter = AdapterArguments(r=4, lora_alpha=6, dropout=0.1, target_modules=["all-linear"], use_rslora=True)
    config = adapter_config("lora", adapter, SharingArguments(), NeuronArguments())
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (4, 6, 0.1, True)
    assert config.target_modules == "all-linear"


def test_aslora_config():
    sharing = SharingArguments(merge_start="3", merge_interval="0.1", num_merges=2, share_a="joint", merge_value="mean")
    config = adapter_config(
        "aslora", AdapterArguments(dropout=0.1, target_modules=["q_proj"]), sharing, NeuronArguments()
    )
    assert isinstance(config, ASLoRAConfig)
    assert (config.merge_start, config.merge_interval, config.num_merges) == (3, 0.1, 2)
    assert isinstance(config.merge_start, int)
    assert (config.share_a, config.merge_value, config.aslora_dropout) == ("joint", "mean", 0.1)
    assert config.target_modules == {"q_proj"}


@pytest.mark.parametrize(
    ("method", "adapter", "sharing", "message"),
    [
        ("lora", {"r": 0}, {}, "r=0 is no rank"),
        ("aslora", {"r": -1}, {}, "r=-1 is no rank"),
        ("lora", {"dropout": 1.0}, {}, r"dropout=1\.0 is out of range"),
        ("lora", {}, {"num_merges": 3}, "num_merges=3 has no meaning with method=lora"),
        ("aslora", {}, {"merge_start": "soon"}, "merge_start='soon' is no number"),
        ("aslora", {}, {"merge_start": "1.5"}, r"merge_start=1\.5 is a fraction of the run and must be below 1"),
        ("aslora", {}, {"merge_interval": "0"}, "merge_interval=0 must be"),
        ("aslora", {}, {"num_merges": -1}, "num_merges=-1 must be"),
    ],
)
def test_bad_fields_are_named(method, adapter, sharing, message):
    with pytest.raises(UsageError, match=message):
        adapter_config(method, AdapterArguments(**adapter), SharingArguments(**sharing), NeuronArguments())


@pytest.mark.parametrize(
    ("method", "adapter", "sharing", "message"),
    [
        (
            "lora",
            {"target_modules": ["q_proj", "c_attn"]},
            {},
            r"target_modules='c_attn' names .* choose from .*q_proj",
        ),
        ("aslora", {"target_modules": ["c_attn"]}, {}, r"target_modules='c_attn' names no module"),
        ("lora", {"exclude_modules": ["head"]}, {}, "exclude_modules='head' names no module"),
        ("lora", {"target_modules": ["mlp"]}, {}, "LlamaMLP"),
        ("aslora", {"target_modules": ["mlp"]}, {}, "LlamaMLP"),
        ("lora", {"layers_to_transform": [9]}, {}, "layers_to_transform.*9"),
        ("aslora", {"layers_to_transform": [9]}, {}, "layers_to_transform.*9"),
        ("aslora", {}, {"num_merges": 4}, "num_merges=4"),
    ],
)
def test_what_the_model_does_not_have_is_named(model_dir, method, adapter, sharing, message):
    config = adapter_config(method, AdapterArguments(**adapter), SharingArguments(**sharing), NeuronArguments())
    with pytest.raises(UsageError, match=message) as error:
        add_adapter(LlamaForCausalLM.from_pretrained(model_dir), config, gradient_checkpointing=False)
    assert "\n" not in str(error.value)


def test_model_and_tokenizer(model_dir):
    model, tokenizer = load_model(ModelArguments(model=str(model_dir)), CPU), load_tokenizer(str(model_dir))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert load_model(ModelArguments(model=str(model_dir), dtype="bfloat16"), CPU).dtype == torch.bfloat16
    assert tokenizer.padding_side == "right"


def test_a_tokenizer_without_padding_pads_with_eos(tmp_path, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    bare.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == "<eos>"


@pytest.mark.parametrize("name", ["./none", "/none", "no/such/model", "none"])
def test_a_missing_model_is_named(name):
    with pytest.raises(UsageError, match=f"model='{name}'"):
        load_tokenizer(name)


def test_a_folder_without_weights_is_named(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="could not be loaded"):
        load_model(ModelArguments(model=str(tmp_path)), CPU)
