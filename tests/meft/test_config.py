"""Fields, their checks, and what is derived from them."""

import json
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig, PeftType

from meft import MEFTConfig, RowOptimizerConfig

KEYS = "in_backward, zero_copy, moments, lr, betas, eps, weight_decay"
# What is given -> the parts that the sentence must have: the field, the value, and the remedy.
REFUSED = [
    *(
        ({name: value}, [f"{name}={value!r}", "an integer of at least 1"])
        for name in ("r", "experts_per_token", "top_k")
        for value in (0, -3, 1.5, "8", True, None)
    ),
    *(({"num_experts": v}, [f"num_experts={v!r}", "None or an integer from 1 to r=4096"]) for v in (0, 4097, 2.0, "x")),
    ({"r": 100, "num_experts": 30, "top_k": 1}, ["r=100", "num_experts=30", "90 or 120", "25 or 50"]),
    ({"r": 7, "num_experts": 5, "top_k": 1, "experts_per_token": 1}, ["r=7", "num_experts=5", "5 or 10", "1 or 7"]),
    ({"r": 32}, ["top_k=64", "r=32", "at most 32"]),
    ({"num_experts": 4}, ["experts_per_token=8", "num_experts=4", "at most 4"]),
    *(
        ({name: value}, [f"{name}={value!r}", *choices])
        for name, value, choices in (
            ("placement", "gpu", ["host", "device"]),
            ("retrieval", "disk", ["auto", "host", "stream", "device-keys", "device-rows"]),
            ("backward_rows", "keep", ["auto", "save", "refetch"]),
            ("gradient_dtype", "float16", ["auto", "float32"]),
            ("row_dtype", "int8", ["auto", "float64", "float32", "bfloat16", "float16"]),
            ("master_dtype", "float16", ["float32", "float64", "bfloat16"]),
        )
    ),
    *(
        ({"router_init_scale": v}, [f"router_init_scale={v!r}", "a number above 0", "50"])
        for v in (0, -1.0, float("nan"), float("inf"), "50", True)
    ),
    *(
        ({"router_aux_loss_coef": v}, [f"router_aux_loss_coef={v!r}", "a number of at least 0"])
        for v in (-0.1, float("nan"), "1", True, None)
    ),
    (
        {"retrieval": "host", "placement": "device"},
        ["retrieval='host'", "placement='device'", "set placement='host'", "leave retrieval out"],
    ),
    ({"row_dtype": "float64"}, ["row_dtype='float64'", "master_dtype='float32'", "row_dtype='auto'"]),
    (
        {"row_dtype": "float32", "master_dtype": "bfloat16"},
        ["row_dtype='float32'", "master_dtype='bfloat16'", "row_dtype='auto'"],
    ),
    (
        {"row_dtype": "float16", "master_dtype": "bfloat16"},
        ["row_dtype='float16'", "master_dtype='bfloat16'", "row_dtype='auto'"],
    ),
    ({"row_optimizer": "adam"}, ["row_optimizer='adam'", "None, a RowOptimizerConfig or a dict", KEYS]),
    ({"row_optimizer": {"momentum": 1}}, ["row_optimizer={'momentum': 1}", KEYS]),
    ({"row_optimizer": {"mode": "lazy"}}, ["row_optimizer={'mode': 'lazy'}", KEYS]),
    *(
        ({"row_optimizer": {name: v}}, ["row_optimizer", f"{name}={v!r}", "a number of at least 0"])
        for name in ("lr", "eps", "weight_decay")
        for v in (-1e-3, "1e-3", float("inf"))
    ),
    *(
        ({"row_optimizer": {"betas": v}}, ["row_optimizer", f"betas={v!r}", "two numbers in [0, 1)", "(0.9, 0.999)"])
        for v in (0.9, (0.9,), (0.9, 1.0), (-0.1, 0.9), (0.9, 0.9, 0.9), ("a", "b"))
    ),
    ({"layers_pattern": "h"}, ["layers_pattern='h'", "layers_to_transform", "set that too"]),
    (
        {"target_modules": r".*\.mlp", "layers_to_transform": [0]},
        ["layers_to_transform=[0]", "target_modules", "put the layers into the expression", "a list"],
    ),
]


@pytest.mark.parametrize(("given", "parts"), REFUSED, ids=[str(given) for given, _ in REFUSED])
def test_a_wrong_value_gets_a_sentence_with_field_value_and_remedy(given, parts):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # all parts of the sentence are looked at below
        MEFTConfig(**given)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == []
    assert message.endswith(".")
    assert "\n" not in message


def test_the_defaults_are_the_papers():
    config = MEFTConfig()
    assert (config.r, config.num_experts, config.experts_per_token, config.top_k) == (4096, None, 8, 64)
    assert (config.router_factor, config.router_init_scale) == (True, 50.0)
    assert (config.placement, config.retrieval, config.pin_memory) == ("host", "auto", True)
    assert (config.row_dtype, config.master_dtype, config.row_optimizer) == ("auto", "float32", None)
    assert (config.router_aux_loss_coef, config.init_weights, config.target_modules) == (0.0, True, None)
    assert config.peft_type == PeftType.MEFT
    assert config.foreign_fields == []


def test_every_field_of_its_own_is_documented():
    inherited = {f.name for f in fields(PeftConfig)}
    for f in fields(MEFTConfig):
        if f.name not in inherited:
            assert len(f.metadata["help"]) > 20, f.name


def test_the_edges_of_the_ranges_are_allowed():
    MEFTConfig(r=1, num_experts=1, experts_per_token=1, top_k=1)
    MEFTConfig(r=6, num_experts=6, experts_per_token=6, top_k=6)
    MEFTConfig(router_aux_loss_coef=0, router_init_scale=1)
    MEFTConfig(placement="device")
    MEFTConfig(placement="host", retrieval="host")
    MEFTConfig(row_optimizer={})
    MEFTConfig(row_optimizer={"lr": 0, "eps": 0, "weight_decay": 0, "betas": [0, 0.0]})
    MEFTConfig(layers_to_transform=[0], layers_pattern="h", target_modules=["mlp"])


FULL = {
    "r": 96,
    "num_experts": 12,
    "experts_per_token": 3,
    "top_k": 5,
    "router_factor": False,
    "router_init_scale": 7.5,
    "init_weights": False,
    "target_modules": ["mlp", "ffn"],
    "exclude_modules": ["layers.0.mlp"],
    "layers_to_transform": [1, 2],
    "layers_pattern": "layers",
    "modules_to_save": ["score"],
    "placement": "host",
    "retrieval": "stream",
    "backward_rows": "refetch",
    "device_rows": 0.25,
    "gradient_dtype": "float32",
    "row_dtype": "bfloat16",
    "master_dtype": "bfloat16",
    "pin_memory": False,
    "row_optimizer": {"lr": 1e-3, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.1},
    "router_aux_loss_coef": 0.25,
    "trainable_token_indices": {"embed_tokens": [1, 2]},
    "ensure_weight_tying": True,
}


ROWS = {
    "device_rows": 0,
    "train_rows": {"top": 5, "background": "counts.safetensors"},
}  # of which one excludes the other


@pytest.mark.parametrize("given", [FULL, FULL | ROWS], ids=["device_rows", "train_rows"])
def test_a_saved_configuration_comes_back(tmp_path, given):
    own = {f.name for f in fields(MEFTConfig)} - {f.name for f in fields(PeftConfig)}
    assert own <= FULL.keys() | ROWS.keys()  # no field is forgotten here
    config = MEFTConfig(**given)
    config.save_pretrained(tmp_path)
    json.loads((tmp_path / "adapter_config.json").read_text())  # plain JSON
    back = PeftConfig.from_pretrained(tmp_path)
    assert type(back) is MEFTConfig
    for name in own:
        assert getattr(back, name) == getattr(config, name), name
    assert back.foreign_fields == []


def test_defaults_come_back_too(tmp_path):
    MEFTConfig().save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == MEFTConfig()


def test_tuples_of_betas_come_back_as_equal_numbers(tmp_path):
    MEFTConfig(row_optimizer={"betas": (0.8, 0.9)}).save_pretrained(tmp_path)
    assert tuple(PeftConfig.from_pretrained(tmp_path).row_optimizer.betas) == (0.8, 0.9)


def test_fields_of_a_newer_version_are_remembered(tmp_path):
    MEFTConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"zeta": 1, "alpha": 2}))
    with pytest.warns(UserWarning, match="alpha"):
        config = MEFTConfig.from_pretrained(tmp_path)
    assert config.foreign_fields == ["alpha", "zeta"]
    assert MEFTConfig().foreign_fields == []


# ---------------------------------------------------------------------- derived


@pytest.mark.parametrize(("r", "experts"), [(4096, 256), (6400, 320), (8464, 368)])
def test_the_default_number_of_experts(r, experts):
    assert MEFTConfig(r=r).experts == experts
    assert MEFTConfig(r=r, num_experts=16).experts == 16


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3000), st.integers(1, 20))
def test_no_more_experts_are_probed_than_there_are(r, wanted):
    config = MEFTConfig(r=r, top_k=1, experts_per_token=wanted)
    assert r % config.experts == 0
    assert config.probed == min(wanted, config.experts)


def test_dense_means_all_neurons_of_all_experts_without_the_factor():
    dense = {"r": 64, "num_experts": 8, "experts_per_token": 8, "top_k": 64, "router_factor": False}
    assert MEFTConfig(**dense).is_dense
    for change in ({"router_factor": True}, {"top_k": 63}, {"experts_per_token": 7}):
        assert not MEFTConfig(**dense | change).is_dense
    few = MEFTConfig(**dense | {"num_experts": None, "experts_per_token": 32})
    assert few.experts == 32
    assert few.is_dense


def test_rows_are_on_the_host_unless_asked_otherwise():
    assert [MEFTConfig(placement=p).on_host for p in ("host", "device")] == [True, False]


def test_every_named_dtype_is_one_of_torch():
    for name in ("float64", "float32", "bfloat16", "float16"):
        assert isinstance(getattr(torch, name), torch.dtype)
        MEFTConfig(row_dtype=name, master_dtype="float64")


def test_configurations_share_no_row_optimizer():
    given = RowOptimizerConfig(lr=1e-3)
    first = MEFTConfig(row_optimizer=given)
    second = replace(first, r=8192)
    second.row_optimizer.lr = 1.0
    assert first.row_optimizer == given == RowOptimizerConfig(lr=1e-3)
