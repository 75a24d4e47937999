"""Tiny base models of each family with adapters that do something, saved for an export."""

import inspect

import torch
from peft import get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from meft import MEFTConfig

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "intermediate_size": 48,
    "n_inner": 48,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "attention_types": [[["global", "local"], 1]],
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "rotary_dim": 4,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_seq_len": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FIELDS = {"r": 48, "num_experts": 8, "experts_per_token": 3, "top_k": 5, "init_weights": False}
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def save_base(folder, family="llama", dtype=torch.float32, **fields):
    """A random model under `folder`, saved."""
    kind = CONFIG_MAPPING[family]
    known = set(inspect.signature(kind.__init__).parameters) | set(getattr(kind, "__dataclass_fields__", {}))
    sizes = {name: value for name, value in SIZES.items() if name in known}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(kind(**sizes | fields)).to(dtype).save_pretrained(folder)
    return folder


def save_adapter(base, folder, dtype=torch.float32, change=None, **fields):
    """An adapter whose part of the outputs is as large as the base model's, saved; returns the PEFT model."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    model = get_peft_model(model, MEFTConfig(**{"task_type": "CAUSAL_LM", **FIELDS, **fields})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".meft_values." in name:
                parameter.mul_(10)
    if change is not None:
        change(model)
    model.save_pretrained(folder)
    return model


def logits(model, ids=IDS, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def served(folder, **options):
    """The export, as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()
