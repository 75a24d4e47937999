"""From module paths to groups, on the module names of real architectures."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BertModel,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
    ViTModel,
)
from transformers.pytorch_utils import Conv1D

from aslora.layer_groups import a_group_of, b_group_name, in_features_of, module_path, parse_layer_path, tower_of
from tests.support.models import config

SIZES = {"num_hidden_layers": 3, "hidden_size": 8, "intermediate_size": 16, "vocab_size": 16}
GPT2 = config("gpt2", n_layer=3, n_embd=8)
T5 = config("t5", num_layers=3, num_decoder_layers=2, d_model=8, d_kv=4, d_ff=16, vocab_size=16)


@pytest.mark.parametrize(
    ("path", "projection", "tower", "layer"),
    [
        ("model.layers.31.mlp.up_proj", "model.layers.*.mlp.up_proj", "model.layers", 31),
        ("transformer.h.0.attn.c_attn", "transformer.h.*.attn.c_attn", "transformer.h", 0),
        ("h.2.attn.c_attn", "h.*.attn.c_attn", "h", 2),
        ("0.q", "*.q", "", 0),
        ("encoder.block.1.layer.0.SelfAttention.q", "encoder.block.*.layer.0.SelfAttention.q", "encoder.block", 1),
        ("model.layers.3.mlp.experts.5.w1", "model.layers.*.mlp.experts.5.w1", "model.layers", 3),
        ("lm_head", "lm_head", "", 0),
        ("lin0", "lin0", "", 0),
        ("vision.proj", "vision.proj", "vision", 0),
        ("layers.0", "layers.0", "layers", 0),  # the last part is never a layer index
        ("mlp.layer2.fc", "mlp.layer2.fc", "mlp.layer2", 0),  # nor is a name that ends on a digit
    ],
)
def test_place(path, projection, tower, layer):
    assert parse_layer_path(path) == (projection, tower, layer)


def test_a_pattern_names_the_list_of_layers():
    path = "stages.1.layers.2.q"
    assert parse_layer_path(path) == ("stages.*.layers.2.q", "stages", 1)
    for pattern in ("layers", ["blocks", "layers"]):
        assert parse_layer_path(path, pattern) == ("stages.1.layers.*.q", "stages.1.layers", 2)
    assert parse_layer_path(path, "blocks") == parse_layer_path(path)


def projections(model):
    """Projection -> its layers, of all linear modules."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            where = parse_layer_path(path)
            found.setdefault(where.projection, []).append(where.layer)
    return found


@pytest.mark.parametrize(
    ("model_class", "shape", "expected"),
    [
        (LlamaForCausalLM, config("llama", **SIZES), "model.layers.*.self_attn.q_proj"),
        (GPT2LMHeadModel, GPT2, "transformer.h.*.attn.c_attn"),
        (GPT2Model, GPT2, "h.*.attn.c_attn"),
        (BertModel, config("bert", **SIZES), "encoder.layer.*.attention.self.query"),
        (ViTModel, config("vit", **SIZES), None),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_every_projection_of_an_architecture_spans_all_layers(model_class, shape, expected):
    with torch.device("meta"):
        model = model_class(shape)
    found = projections(model)
    of_layers = {name: layers for name, layers in found.items() if "*" in name}
    assert all(layers == [0, 1, 2] for layers in of_layers.values())
    assert len(of_layers) >= 4
    assert all(len(layers) == 1 for name, layers in found.items() if "*" not in name)  # heads and poolers
    assert expected is None or expected in of_layers


def test_t5_keeps_towers_and_kinds_of_attention_apart():
    with torch.device("meta"):
        found = projections(T5ForConditionalGeneration(T5))
    queries = {name: layers for name, layers in found.items() if name.endswith(".q")}
    assert queries == {
        "encoder.block.*.layer.0.SelfAttention.q": [0, 1, 2],
        "decoder.block.*.layer.0.SelfAttention.q": [0, 1],
        "decoder.block.*.layer.1.EncDecAttention.q": [0, 1],
    }


def test_group_names():
    name = b_group_name(parse_layer_path("model.layers.3.mlp.up_proj"), 8, 32)
    assert name == "model/layers/*/mlp/up_proj:8x32"
    assert a_group_of(name, "per_projection") == "model/layers/*/mlp/up_proj:8"
    assert a_group_of(name, "joint") == "model/layers:8"


def test_joint_a_is_one_for_a_tower_and_an_input_size():
    paths = ["encoder.layers.0.q", "encoder.layers.1.v", "decoder.layers.0.q"]
    names = {size: [b_group_name(parse_layer_path(path), size, 4) for path in paths] for size in (8, 16)}
    assert [a_group_of(name, "joint") for name in names[8]] == ["encoder/layers:8"] * 2 + ["decoder/layers:8"]
    assert a_group_of(names[16][0], "joint") == "encoder/layers:16"


part = st.one_of(
    st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,5}", fullmatch=True), st.integers(min_value=0, max_value=40).map(str)
)


@given(
    path=st.lists(part, min_size=1, max_size=7).map(".".join),
    in_features=st.integers(1, 9999),
    out_features=st.integers(1, 9999),
    pattern=st.one_of(st.none(), part, st.lists(part, max_size=3)),
)
def test_a_group_name_gives_back_the_path_it_came_from(path, in_features, out_features, pattern):
    where = parse_layer_path(path, pattern)
    name = b_group_name(where, in_features, out_features)
    assert "." not in name  # a key of nn.ModuleDict
    assert module_path(name, where.layer) == path
    assert module_path(name, "*") == where.projection
    assert tower_of(name).replace("/", ".") == where.tower
    assert in_features_of(name) == in_features
    assert a_group_of(name, "per_projection").replace("/", ".") == f"{where.projection}:{in_features}"
    assert a_group_of(name, "joint").replace("/", ".") == f"{where.tower}:{in_features}"


@given(path=st.lists(part, min_size=1, max_size=6).map(".".join), layers=st.lists(st.integers(0, 99), min_size=2))
def test_the_layer_index_alone_makes_no_other_group(path, layers):
    paths = [f"model.layers.{layer}.{path}" for layer in layers]
    assert len({parse_layer_path(p).projection for p in paths}) == 1
    assert [parse_layer_path(p).layer for p in paths] == layers
