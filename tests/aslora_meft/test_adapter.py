import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from aslora_meft.adapter import add_adapter, load_model, load_tokenizer
from aslora_meft.arguments.config_arguments import make_config
from aslora_meft.arguments.groups import ModelArguments
from aslora_meft.arguments.model_checks import _layer_numbers, check_indices
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
        ("lora", {"layers_to_transform": ["1"], "layers_pattern": ["blocks"]}, "layers_pattern names none"),
        ("aslora", {"num_merges": "4"}, "num_merges=4"),
        ("lora", {"rank_pattern": '{"q_proj": 1000000000}'}, "rank_pattern of 'q_proj'=1000000000 needs at least"),
        *(
            ("lora", {"layer_replication": pairs}, r"layer_replication has .*; give pairs such as \[0, 4\]")
            for pairs in ("[[0, 99]]", "[[2, 2]]", "[5]", '[["a", 1]]')
        ),
        ("lora", {"target_parameters": ["nope"]}, "target_parameters='nope' names no parameter"),
        ("lora", {"modules_to_save": [""]}, "modules_to_save='' names no module"),
    ],
)
def test_what_the_model_does_not_have_is_named(model_dir, method, given, message):
    config = make_config(method, given)
    with pytest.raises(UsageError, match=message) as error:
        add_adapter(LlamaForCausalLM.from_pretrained(model_dir), config, gradient_checkpointing=False)
    assert "\n" not in str(error.value)


def test_layers_are_numbered_as_peft_does():
    """Neither experts nor the blocks behind them count, and with a pattern only what stands behind it."""
    paths = [f"model.layers.{layer}.mlp.experts.{expert}.up" for layer in range(2) for expert in range(8)]
    assert _layer_numbers(SimpleNamespace(layers_pattern=None), paths) == [0, 1]
    assert _layer_numbers(SimpleNamespace(layers_pattern=["layers"]), [*paths, "vision.blocks.5.up"]) == [0, 1]


def test_tokens_without_an_embedding_are_one_sentence(model_dir):
    model = LlamaForCausalLM.from_pretrained(model_dir)
    model.set_input_embeddings(torch.nn.Linear(4, 4))
    with pytest.raises(UsageError, match="trainable_token_indices needs a name for this model; choose from no module"):
        check_indices(make_config("lora", {"trainable_token_indices": ["1"]}), model)


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
