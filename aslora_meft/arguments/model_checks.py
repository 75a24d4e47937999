"""Checks of an adapter's config against a model: what PEFT ignores, trips over, or makes too large."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import PreTrainedModel

from aslora_meft.arguments.checks import shown
from aslora_meft.errors import UsageError
from meft.cost.host_memory import available_bytes

# To modules_to_save PEFT adds those of a task by itself, of which a model has one.
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def check_memory(config: Any, model: torch.nn.Module) -> None:
    """Check that the adapter's values, at four bytes each, fit into this machine's memory.

    Raises:
        UsageError: they do not even if a single layer is adapted.
    """
    pattern = getattr(config, "rank_pattern", None) or {}
    ranks = {"r": getattr(config, "r", None), **{f"rank_pattern of {key!r}": rank for key, rank in pattern.items()}}
    width = max((max(p.shape) for p in model.parameters() if p.ndim > 1), default=1)
    narrow = min((min(p.shape) for p in model.parameters() if p.ndim > 1), default=1)
    available = available_bytes()
    for name, r in ranks.items():
        if isinstance(r, int) and available is not None and 4 * r * narrow > available:
            raise UsageError(
                f"{name}={shown(r)} needs at least {shown(-(-4 * r * narrow // 2**30))} GiB a layer and this machine "
                f"has {available / 2**30:,.0f}; give a smaller one (the widest layer has {width})"
            )


def check_indices(config: Any, model: PreTrainedModel) -> None:
    """Check what an adapter's config says beside its targets, of which PEFT ignores a part and trips over another.

    Raises:
        UsageError: a layer, token, parameter or module that the model does not have.
    """
    modules = dict(model.named_modules())
    _check_layers(config, model, list(modules))
    heads = HEADS.get(getattr(config, "task_type", None) or "", ())
    for name in getattr(config, "modules_to_save", None) or []:
        if name not in heads and not (name and any(path.endswith(name) for path in modules)):
            raise UsageError(f"modules_to_save={name!r} names no module of the model; correct it or drop it")
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for name in getattr(config, "target_parameters", None) or []:
        if not any(path == name or path.endswith(f".{name}") for path in parameters):
            raise UsageError(f"target_parameters={name!r} names no parameter of the model; correct it or drop it")
    _check_trained_tokens(config, model, modules)
    invocation = getattr(config, "alora_invocation_tokens", None)
    if invocation is not None:  # a token that there is not would switch the adapter off for good
        _check_tokens("alora_invocation_tokens", invocation, model.config.get_text_config().vocab_size)


def _check_layers(config: Any, model: PreTrainedModel, paths: list[str]) -> None:
    replicated = getattr(config, "layer_replication", None)
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    for part in replicated or []:
        pair = isinstance(part, list | tuple) and len(part) == 2 and all(type(number) is int for number in part)
        if not (pair and 0 <= part[0] < part[1] <= count):
            raise UsageError(
                f"layer_replication has {str(part)[:40]}, which is no range of the model's {count} layers; give pairs "
                f"such as [0, {count}], each of a first layer and the one after its last"
            )
    numbers = range(sum(end - start for start, end in replicated)) if replicated else _layer_numbers(config, paths)
    layers = getattr(config, "layers_to_transform", None)
    for layer in layers if isinstance(layers, list) else [] if layers is None else [layers]:
        if layer not in numbers:
            choice = f"give {min(numbers)} to {max(numbers)}" if numbers else "layers_pattern names none; correct it"
            raise UsageError(f"layers_to_transform={str(layer)[:24]} is no layer; {choice}")


def _layer_numbers(config: Any, paths: list[str]) -> list[int]:
    """PEFT's: the first number in a module's path, or the one behind `layers_pattern`."""
    given = getattr(config, "layers_pattern", None) or []
    patterns = [given] if isinstance(given, str) else given
    wanted = [rf"(?:^|.*?\.){pattern}\.(?P<number>\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(?P<number>\d+)\."]
    found = {int(match["number"]) for path in paths for one in wanted if (match := re.match(one, path))}
    return sorted(found)


def _check_trained_tokens(config: Any, model: PreTrainedModel, modules: dict[str, torch.nn.Module]) -> None:
    tokens = getattr(config, "trainable_token_indices", None)
    if tokens is None:
        return
    tables = {path: module for path, module in modules.items() if isinstance(module, torch.nn.Embedding)}
    for name, indices in tokens.items() if isinstance(tokens, dict) else [(None, tokens)]:
        if name is None:
            of = [module for module in tables.values() if module is model.get_input_embeddings()]
        else:
            of = [module for path, module in tables.items() if path == name or path.endswith(f".{name}")]
        if not of:
            what = f"names {name!r}, which is no embedding" if name is not None else "needs a name for this model"
            choice = ", ".join(sorted({path.rpartition(".")[2] for path in tables})) or "no module: there is none"
            raise UsageError(f"trainable_token_indices {what}; choose from {choice}")
        _check_tokens("trainable_token_indices", indices, min(module.num_embeddings for module in of))


def _check_tokens(field: str, indices: Any, most: int) -> None:
    if not (isinstance(indices, list) and all(type(index) is int and 0 <= index < most for index in indices)):
        raise UsageError(f"{field}={str(indices)[:60]} has what is no token; give integers from 0 to {most - 1}")
