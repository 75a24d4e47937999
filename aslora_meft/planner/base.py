"""The base model that a plan is about: made from its config, on the meta device, without weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from aslora_meft.adapter import check_causal, check_model
from aslora_meft.errors import as_usage_error
from aslora_meft.planner import attention
from aslora_meft.planner.quantised import QUANTISED

# Of these, transformers runs the models' own attention code, which keeps [heads, length, length] as plain attention.
_OWN_ATTENTION = ("falcon", "gpt_neo", "gptj", "mpt")
DTYPES = ("float32", "bfloat16", "float16", *QUANTISED)


def load_config(model: str, *, trust_remote_code: bool = False) -> Any:
    """The config of a model, from a folder or the hub.

    Raises:
        UsageError: there is none, or none of a causal language model.
    """
    with as_usage_error(Exception, prefix=f"model={model!r} has no config that can be read: "):
        config = AutoConfig.from_pretrained(check_model("model", model), trust_remote_code=trust_remote_code)
    check_causal(config, model)
    return config


def config_dtype(config: Any) -> str:
    """The dtype that a config names for its weights, bfloat16 where it names none."""
    named = config.dtype
    return "bfloat16" if named is None else str(named).removeprefix("torch.")


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
    refused = as_usage_error(Exception, prefix="the model's config makes no causal language model: ")
    with torch.device("meta"), refused:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=compute_dtype(dtype), attn_implementation=attending
        )
    return model
