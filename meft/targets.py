"""Which modules of a model are its FFNs, and how wide they are."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import MEFTConfig

# Model types whose FFN is one module: y = mlp(x), with x after the norm.
_MLP = [
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "phi",
    "phi3",
    "gpt2",
    "gpt_neox",
    "gptj",
    "gpt_neo",
    "gpt_bigcode",
    "starcoder2",
    "stablelm",
    "falcon",
    "bloom",
    "cohere",
    "cohere2",
    "olmo",
    "olmo2",
    "olmo3",
    "granite",
    "smollm3",
    "glm",
    "glm4",
    "nemotron",
    "codegen",
    "mpt",
    "persimmon",
]
# BERT and its kin split the FFN into intermediate and output; the second one sees the FFN's input as `input_tensor`.
_SPLIT = ["bert", "roberta", "xlm-roberta", "camembert", "electra"]

FFN_OF: dict[str, Any] = {
    **{name: ["mlp"] for name in _MLP},
    "mpt": ["ffn"],
    "gemma3": r"(.*\.)?language_model\.layers\.\d+\.mlp",  # not the vision tower's
    **dict.fromkeys(_SPLIT, r"(.*\.)?layer\.\d+\.output"),
}


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one linear layer, quantised ones included."""
    return isinstance(module, nn.Linear | Conv1D) or (hasattr(module, "in_features") and not list(module.children()))


def candidates(model: nn.Module) -> list[str]:
    """Names of the modules that look like an FFN: two linear layers or more, in a list of layers, no attention."""
    names = set()
    for path, module in model.named_modules():
        parent, _, name = path.rpartition(".")
        linear = sum(is_linear(m) for m in module.modules() if m is not module)
        if parent.rpartition(".")[2].isdigit() and linear >= 2 and "att" not in name.lower():
            names.add(name)
    return sorted(names)


def ffn_width(module: nn.Module, model: nn.Module) -> int:
    """Hidden size d of an FFN: the model's, or where that is unknown the width of its first linear layer.

    Raises:
        ValueError: it cannot be told.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    width = config.get("hidden_size") if isinstance(config, dict) else getattr(config, "hidden_size", None)
    if isinstance(width, int):
        return width
    for part in module.modules():
        if isinstance(part, Conv1D):
            return int(part.weight.shape[0])
        if isinstance(getattr(part, "in_features", None), int):
            return int(part.in_features)  # type: ignore[arg-type]
    raise ValueError(
        f"The hidden size of {type(module).__name__} is unknown: the model's config has no hidden_size and the module "
        "no linear layer; change target_modules."
    )


def ffn_targets(config: MEFTConfig, model_type: str | None, model: nn.Module) -> set[str] | str:
    """The default `target_modules` of a model type; takes `layers_to_transform` in where that is an expression.

    Raises:
        ValueError: the FFN of the model type is not known.
    """
    known = FFN_OF.get(model_type or "")
    if known is None:
        found = candidates(model)
        listed = f"candidates in this model: {', '.join(found)}" if found else "no module of this model looks like one"
        raise ValueError(f"target_modules=None: the FFN of model type '{model_type}' is not known; name it, {listed}.")
    if not isinstance(known, str):
        return set(known)
    if config.layers_to_transform is not None:
        # PEFT ignores layers_to_transform beside a regular expression.
        given = config.layers_to_transform
        layers = "|".join(map(str, [given] if isinstance(given, int) else given))
        known = known.replace(r"\d+", f"({layers})")
        config.layers_to_transform = config.layers_pattern = None
    return known


def check_ffn(module: nn.Module, path: str, parent: nn.Module, model: nn.Module) -> None:
    """Check that an adapter can stand beside a module.

    Raises:
        ValueError: it is no FFN, or its input comes in pieces.
    """
    if is_linear(module) or isinstance(module, nn.Embedding | nn.ModuleList | nn.MultiheadAttention):
        found = candidates(model)
        raise ValueError(
            f"Target module '{path}' ({type(module).__name__}) is no FFN: MEFT stands beside a whole FFN; set "
            f"target_modules to its name{', one of ' + ', '.join(found) if found else ''}."
        )
    if pieces := getattr(parent, "chunk_size_feed_forward", 0):
        raise ValueError(
            f"chunk_size_feed_forward={pieces} in the model's config cuts the FFN's input into pieces that the padding "
            "mask does not fit: set it to 0, which changes no result."
        )
