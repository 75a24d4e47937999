"""The frozen models of the 24 GB benchmark: shapes written out, random weights made where they are computed with."""

import importlib.util
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

SHAPES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama-2-7b": (
        LlamaForCausalLM, LlamaConfig,
        dict(
            vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=42, num_attention_heads=32,
            num_key_value_heads=32, max_position_embeddings=4096, rms_norm_eps=1e-5, rope_theta=10000.0,
        ),
    ),
    "mistral-7b": (
        MistralForCausalLM, MistralConfig,
        dict(
            vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=32,
            num_key_value_heads=8, max_position_embeddings=32768, rms_norm_eps=1e-5, rope_theta=10000.0,
            sliding_window=4096,
        ),
    ),
    # Of a dry run: nothing that is measured on it means anything.
    "tiny-llama": (
        LlamaForCausalLM, LlamaConfig,
        dict(
            vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=128,
        ),
    ),
    "tiny-mistral": (
        MistralForCausalLM, MistralConfig,
        dict(
            vocab_size=128, hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, sliding_window=64,
        ),
    ),
}  # fmt: skip


class MissingError(RuntimeError):
    """A package that a row needs is not installed."""


def require(package: str) -> None:
    """Raises: MissingError: the package is not there."""
    if importlib.util.find_spec(package) is None:
        raise MissingError(f"not installed: {package}")


def frozen_model(name: str, base: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A model with random weights, N(0, 0.02^2) and norms of 1, in training mode with gradient checkpointing.

    Args:
        base: "bf16" (in `dtype`), or "nf4": the linear layers in bitsandbytes' NF4 with double quantisation.
    """
    if base == "nf4":
        require("bitsandbytes")
    kind, config_kind, fields = SHAPES[name]
    with torch.device("meta"):
        model = kind(config_kind(**fields, use_cache=False))
    torch.manual_seed(0)
    # Module by module: at no time is there more than one weight that is not in its place and form.
    for path, module in list(model.named_modules()):
        for key, old in list(module.named_parameters(recurse=False)):
            with torch.no_grad():
                new = torch.empty(old.shape, dtype=dtype, device=device)
                new.fill_(1.0) if old.ndim == 1 else new.normal_(0.0, 0.02)
            setattr(module, key, nn.Parameter(new, requires_grad=False))
        if base == "nf4" and isinstance(module, nn.Linear) and not path.endswith("lm_head"):
            parent, _, key = path.rpartition(".")
            setattr(model.get_submodule(parent), key, _nf4(module, dtype))
    # Its buffers are no weights: made anew from the configuration.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
    if base == "nf4":
        model.is_loaded_in_4bit = True  # as a loaded one says it: PEFT looks here
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _nf4(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    import bitsandbytes as bnb

    device = linear.weight.device
    packed = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    packed.weight = bnb.nn.Params4bit(
        linear.weight.detach(), requires_grad=False, quant_type="nf4", compress_statistics=True, module=packed
    )
    return packed.to(device)  # which packs it
