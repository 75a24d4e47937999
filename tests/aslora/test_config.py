"""The fields, their defaults, and what impossible values get."""

import dataclasses
import json
import math

import pytest
from peft import LoraConfig, PeftConfig

from aslora import ASLoRAConfig

# The first value of each row in the table of open choices, and the published r and alpha.
DEFAULTS = {
    "r": 8,
    "lora_alpha": 16,
    "aslora_dropout": 0.0,
    "merge_start": None,
    "merge_interval": None,
    "num_merges": None,
    "total_steps": None,
    "merge_candidates": "all",
    "merge_scope": "per_projection",
    "share_a": "per_projection",
    "similarity": "factor",
    "merge_value": "upper",
    "init_weights": True,
    "use_rslora": False,
    "bias": "none",
}


def test_defaults():
    config = ASLoRAConfig()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert config.peft_type == "ASLORA"
    assert not isinstance(config, LoraConfig)


def test_every_field_of_its_own_is_documented():
    inherited = {f.name for f in dataclasses.fields(PeftConfig)}
    for field in dataclasses.fields(ASLoRAConfig):
        if field.name not in inherited:
            assert len(field.metadata["help"]) > 20, field.name


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        ({"r": 0}, "at least 1, e.g. r=8"),
        ({"r": 2.0}, "integer"),
        ({"r": True}, "integer"),
        ({"lora_alpha": 0}, "above 0"),
        ({"lora_alpha": math.nan}, "above 0"),
        ({"aslora_dropout": 1.0}, r"\[0, 1\)"),
        ({"aslora_dropout": -0.1}, r"\[0, 1\)"),
        ({"merge_start": -1}, "int >= 0"),
        ({"merge_start": 1.0}, "for steps use an int, merge_start=1"),
        ({"merge_start": math.inf}, "fraction in"),
        ({"merge_interval": 0}, "int >= 1"),
        ({"merge_interval": 0.0}, "int >= 1"),
        ({"merge_interval": 240.0}, "for steps use an int, merge_interval=240"),
        ({"merge_interval": True}, "int >= 1"),
        ({"num_merges": -1}, "at least 0"),
        ({"num_merges": 1.5}, "integer"),
        ({"total_steps": 0}, "from 1 to 2"),
        ({"total_steps": 10**400}, "from 1 to 2"),
        ({"merge_candidates": "some"}, "all, adjacent"),
        ({"merge_scope": "tower"}, "per_projection, joint"),
        ({"share_a": "none"}, "per_projection, joint"),
        ({"similarity": "cosine"}, "factor, product"),
        ({"merge_value": "lower"}, "upper, mean"),
        ({"bias": "lora_only"}, "none, all, aslora_only"),
        ({"layers_pattern": "layers"}, "layers_to_transform"),
    ],
    ids=str,
)
def test_an_impossible_value_is_named_with_its_remedy(fields, remedy):
    (name, value), *_ = fields.items()
    with pytest.raises(ValueError, match=remedy) as error:
        ASLoRAConfig(**fields)
    assert f"{name}={value!r}" in str(error.value)


@pytest.mark.parametrize("limit", [{"layers_to_transform": 0}, {"layers_to_transform": [1]}], ids=str)
def test_a_regular_expression_excludes_a_choice_of_layers(limit):
    with pytest.raises(ValueError, match=r"layers_to_transform.*regular expression"):
        ASLoRAConfig(target_modules=".*q_proj", **limit)
    ASLoRAConfig(target_modules="all-linear", **limit)  # not an expression


def test_scaling():
    assert ASLoRAConfig(r=4, lora_alpha=6).scaling == 1.5
    assert ASLoRAConfig(r=4, lora_alpha=6, use_rslora=True).scaling == 3.0


def test_a_saved_config_is_read_back_and_json(tmp_path):
    config = ASLoRAConfig(
        r=3, target_modules=["q", "v"], exclude_modules=["x"], merge_start=0.1, merge_interval=5, similarity="product"
    )
    config.save_pretrained(tmp_path)
    read = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(read, ASLoRAConfig)
    assert read == config
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "ASLORA"
