"""PEFT's LoRA rows, said in ASLoRA's fields; and rows of our own for the options that LoRA lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from peft import LoraConfig

from aslora import ASLoRAConfig

# LoRA's fields and targets that ASLoRA does not have: rows with them are left out, and counted by this reason.
NOT_OURS = {
    "alora_invocation_tokens": "activated LoRA",
    "kasa_config": "LoRA variant KaSA",
    "lora_bias": "bias on LoRA's B",
    "monteclora_config": "LoRA variant MonteCLoRA",
    "rank_pattern": "ranks by layer",
    "alpha_pattern": "alphas by layer",
    "target_parameters": "targets that are parameters, not layers",
    "trainable_token_indices": "trainable tokens, a LoRA extra",
    "use_bdlora": "LoRA variant BD-LoRA",
    "use_dora": "LoRA variant DoRA",
    "velora_config": "LoRA variant VeLoRA",
}
OTHER_LAYERS = {
    "emb": "nn.Embedding",
    "embed_tokens": "nn.Embedding",
    "conv2d": "nn.Conv2d",
    "conv3d": "nn.Conv3d",
    "mha": "nn.MultiheadAttention",
}
_RENAMED = {"init_lora_weights": "init_weights", "lora_dropout": "aslora_dropout"}
_SAME = {f.name for f in fields(LoraConfig)} & {f.name for f in fields(ASLoRAConfig)}
_BOOKKEEPING = {"peft_type", "auto_mapping", "peft_version", "revision", "runtime_config"}


class NotOurs(Exception):  # noqa: N818
    """The row asks for what ASLoRA does not offer; the message names it."""


def translate(kwargs: dict[str, Any], model_id: str | None = None) -> dict[str, Any]:
    """Arguments of LoraConfig -> those of ASLoRAConfig.

    Raises:
        NotOurs: they ask for something that ASLoRA does not offer.
        KeyError: a field that this table does not know, e.g. of a newer PEFT.
    """
    ours = {}
    targets = kwargs.get("target_modules") or []
    for target in [targets] if isinstance(targets, str) else targets:
        for layer, kind in OTHER_LAYERS.items():
            if target.rpartition(".")[2].lstrip("^") == layer:
                raise NotOurs(kind)
        if target == "conv1d" and model_id == "Conv1d":  # EmbConv1D's is transformers' Conv1D
            raise NotOurs("nn.Conv1d")
    for name, value in kwargs.items():
        if name in NOT_OURS:
            raise NotOurs(NOT_OURS[name])
        if name == "init_lora_weights" and not isinstance(value, bool):
            raise NotOurs(f"LoRA initialisation {value}")
        if name not in _RENAMED and name not in _SAME:
            raise KeyError(f"LoraConfig has the field '{name}', which the table of the harness lacks")
        ours[_RENAMED.get(name, name)] = "aslora_only" if (name, value) == ("bias", "lora_only") else value
    return ours


def as_aslora(**kwargs: Any) -> ASLoRAConfig:
    """Stands for LoraConfig in PEFT's hard-coded tests."""
    return ASLoRAConfig(**translate(kwargs))


def translate_config(config: LoraConfig) -> ASLoRAConfig:
    """An ASLoRAConfig with what a LoraConfig has set."""
    default = vars(LoraConfig())
    return as_aslora(**{k: v for k, v in vars(config).items() if k not in _BOOKKEEPING and v != default[k]})


def translate_row(row: Sequence[Any]) -> list[Any] | None:
    """A row of a parametrisation with ASLoRA in LoRA's place; None if LoRA does not occur in it.

    Raises:
        NotOurs: see `translate`.
    """
    if not any(value is LoraConfig or type(value) is LoraConfig for value in row):
        return None
    has_class = any(value is LoraConfig for value in row)
    model_id = next((value for value in row if isinstance(value, str) and value in ("Conv1d", "EmbConv1D")), None)
    ours: list[Any] = []
    for value in row:
        if value is LoraConfig:
            ours.append(ASLoRAConfig)
        elif type(value) is LoraConfig:
            ours.append(translate_config(value))
        elif isinstance(value, dict) and has_class:
            ours.append(translate(value, model_id))
        elif isinstance(value, str):
            ours.append(value.replace("LoRA", "ASLoRA"))
        else:
            ours.append(value)
    return ours


def with_options(row: Sequence[Any], options: Sequence[dict[str, Any]]) -> list[Any]:
    """A row of LoRA in ASLoRA's fields, with options of our own: one dict for each dict in the row."""
    left = iter(options)
    ours = [{**translate(value), **next(left)} if isinstance(value, dict) else value for value in row]
    return [ASLoRAConfig if value is LoraConfig else value for value in ours]


_LINEAR = {"target_modules": ["lin0", "lin1"]}
_CONV1D = {"target_modules": ["conv1d"]}
_NOW = {"merge_start": 0, "merge_interval": 1}
_RANDOM = {"init_lora_weights": False}

# Names of the parameters -> (row of LoRA, what ASLoRA has set beyond it, once for each dict in the row).
# "Deep" is a model of our own (models.py): four equal blocks, in which layers share and merge while PEFT trains.
EXTRA: dict[tuple[str, ...], list[tuple[list[Any], list[dict[str, Any]]]]] = {
    ("test_name", "model_id", "config_cls", "config_kwargs"): [
        (["MLP rsLoRA", "MLP", LoraConfig, {**_LINEAR, "use_rslora": True, "r": 4}], [{}]),
        (["MLP one A, product", "MLP", LoraConfig, {**_LINEAR}], [{"share_a": "joint", "similarity": "product"}]),
        (["MLP joint, mean", "MLP", LoraConfig, _LINEAR], [{"merge_scope": "joint", "merge_value": "mean", **_NOW}]),
        (["Conv1D fan_in_fan_out", "EmbConv1D", LoraConfig, {**_CONV1D, "fan_in_fan_out": True}], [{}]),
        (["Conv1D + Linear", "EmbConv1D", LoraConfig, {"target_modules": ["conv1d", "lin0"]}], [{"share_a": "joint"}]),
        (["Deep, merging", "Deep", LoraConfig, _LINEAR], [_NOW]),
        (
            ["Deep, joint, merging", "Deep", LoraConfig, {**_LINEAR, "modules_to_save": ["head"]}],
            [{**_NOW, "share_a": "joint", "merge_scope": "joint", "merge_value": "mean", "similarity": "product"}],
        ),
        (
            ["Deep, adjacent, part of the layers", "Deep", LoraConfig, {**_LINEAR, "layers_to_transform": [0, 2, 3]}],
            [{**_NOW, "merge_candidates": "adjacent", "num_merges": 2, "aslora_dropout": 0.1}],
        ),
    ],
    ("test_name", "tuner_method", "config_cls", "config_kwargs_1", "config_kwargs_2"): [
        (
            ["one A", "lora", LoraConfig, {**_LINEAR, **_RANDOM}, {**_LINEAR, **_RANDOM, "r": 4}],
            [{"share_a": "joint"}, {"share_a": "joint"}],
        ),
        (
            ["options differ", "lora", LoraConfig, {**_LINEAR, **_RANDOM}, {"target_modules": ["lin0"], **_RANDOM}],
            [{"merge_value": "mean"}, {"merge_scope": "joint", "use_rslora": True}],
        ),
    ],
}

# Tests or classes whose parametrisations have no LoRA row: these are added as if they had.
ADDED: dict[str, list[list[Any]]] = {
    "TestQuantization": [[LoraConfig, {"r": 8, "target_modules": ["q_proj", "v_proj"]}]],
}
