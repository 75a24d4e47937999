"""The base model that a plan is about: made from its config, on the meta device, without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from aslora_meft.errors import UsageError, as_usage_error
from aslora_meft.planner import attention
from aslora_meft.planner.quantised import QUANTISED
from meft.step_time import BaseModel

# Of these, transformers runs the models' own attention code, which keeps [heads, length, length] as plain attention.
_OWN_ATTENTION = ("falcon", "gpt_neo", "gptj", "mpt")
DTYPES = ("float32", "bfloat16", "float16", *QUANTISED)


def load_config(model: str) -> Any:
    """The config of a model, from a folder or the hub.

    Raises:
        UsageError: there is none.
    """
    if not Path(model).expanduser().exists() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise UsageError(f"MODEL={model!r} does not exist; give a folder with a config.json, or a hub id")
    with as_usage_error(OSError, ValueError, prefix=f"MODEL={model!r} has no config that can be read: "):
        return AutoConfig.from_pretrained(model)


def compute_dtype(dtype: str) -> torch.dtype:
    """The dtype of the hidden states: bfloat16 over quantised weights."""
    found: torch.dtype = torch.bfloat16 if dtype in QUANTISED else getattr(torch, dtype)
    return found


def build_base(config: Any, dtype: str) -> PreTrainedModel:
    """A causal language model of these shapes on the meta device.

    Raises:
        UsageError: the config is of no causal language model, or lacks what that needs.
    """
    attention.register()
    config.use_cache = False
    attending = "eager" if config.model_type in _OWN_ATTENTION else attention.NAME
    refused = as_usage_error(ValueError, TypeError, prefix="MODEL's config makes no causal language model: ")
    with torch.device("meta"), refused:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=compute_dtype(dtype), attn_implementation=attending
        )
    return model


def speed_shape(model: PreTrainedModel, ffns: list[nn.Module], length: int, weight_bytes: float) -> BaseModel:
    """What the step-time model asks for; layers without an adapter are shared out among those with one.

    Args:
        ffns: the adapted FFNs' own modules, at least one.
        weight_bytes: of a weight as it is stored.
    """
    config: Any = model.config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    used = min(1.0, (getattr(config, "num_experts_per_tok", None) or experts) / experts)
    head, embedding = (cast(Any, m).weight for m in (model.get_output_embeddings(), model.get_input_embeddings()))
    outside = {id(head), id(embedding)}
    ffn = sum(p.numel() for module in ffns for p in module.parameters())
    rest = sum(p.numel() for p in model.parameters() if id(p) not in outside) - ffn
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    layers = len(ffns)
    return BaseModel(length, rest // layers, int(ffn * used) // layers, heads * size, head.numel(), weight_bytes)
