import copy

import pytest
import torch
from transformers import LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from aslora_meft.adapter import add_adapter, load_model, load_tokenizer
from aslora_meft.arguments.config_arguments import make_config
from aslora_meft.arguments.groups import ModelArguments
from aslora_meft.errors import UsageError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        (
            "lora",
            {"target_modules": ["q_proj", "c_attn"]},
            r"target_modules='c_attn' names .* choose from .*q_proj",
        ),
        ("aslora", {"target_modules": ["c_attn"]}, r"target_modules='c_attn' names no module"),
        ("lora", {"exclude_modules": ["head"]}, "exclude_modules='head' names no module"),
        ("lora", {"target_modules": ["mlp"]}, "LlamaMLP"),
        ("aslora", {"target_modules": ["mlp"]}, "LlamaMLP"),
        ("lora", {"layers_to_transform": ["9"]}, "layers_to_transform.*9"),
        ("aslora", {"layers_to_transform": ["9"]}, "layers_to_transform.*9"),
        ("aslora", {"num_merges": "4"}, "num_merges=4"),
    ],
)
def test_what_the_model_does_not_have_is_named(model_dir, method, given, message):
    config = make_config(method, given)
    with pytest.raises(UsageError, match=message) as error:
        add_adapter(LlamaForCausalLM.from_pretrained(model_dir), config, gradient_checkpointing=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["lora", "aslora"])
def test_an_architecture_without_defaults_names_the_option_and_the_modules(method):
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Phi3Config(vocab_size=64, num_hidden_layers=2, pad_token_id=0, **fields)
    sentence = r"--target_modules.*down_proj.*qkv_proj.*all-linear"
    with pytest.raises(UsageError, match=sentence):
        add_adapter(Phi3ForCausalLM(config), make_config(method, {}), gradient_checkpointing=False)


def test_model_and_tokenizer(model_dir):
    model, tokenizer = (
        load_model(ModelArguments(model=str(model_dir)), CPU),
        load_tokenizer(ModelArguments(model=str(model_dir))),
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert load_model(ModelArguments(model=str(model_dir), dtype="bfloat16"), CPU).dtype == torch.bfloat16
    assert tokenizer.padding_side == "right"


def test_a_tokenizer_without_padding_pads_with_eos(tmp_path, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    bare.save_pretrained(tmp_path)
    assert load_tokenizer(ModelArguments(model=str(tmp_path))).pad_token == "<eos>"


@pytest.mark.parametrize("name", ["./none", "/none", "no/such/model", "none"])
def test_a_missing_model_is_named(name):
    with pytest.raises(UsageError, match=f"model='{name}'"):
        load_tokenizer(ModelArguments(model=name))


def test_a_folder_without_weights_is_named(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="could not be loaded"):
        load_model(ModelArguments(model=str(tmp_path)), CPU)
