"""Tiny random models of transformers' architectures, from their configurations alone."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto

HEADS = {
    "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    "classification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "encoder": auto.MODEL_FOR_MASKED_LM_MAPPING,
}
VOCABULARY = 96
SIZES = {
    32: "hidden_size d_model n_embd dim embed_dim emb_dim embedding_size word_embed_proj_dim model_dim d_embed",
    64: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner d_inner dff feed_forward_size "
    "hidden_dim ffn_hidden_size inner_dim intermediate_size_mlp shared_expert_intermediate_size "
    "dense_intermediate_size expert_ffn_hidden_size shared_intermediate_size prefix_dense_intermediate_size",
    16: "moe_intermediate_size expert_intermediate_size index_head_dim",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers num_heads_kv "
    "num_encoder_layers num_key_value_heads encoder_num_key_value_heads decoder_num_key_value_heads "
    "num_experts_per_tok num_experts_per_token moe_top_k moe_topk num_shared_layers num_encoder_decoder_layers",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts",
    8: "head_dim d_kv rotary_dim qk_nope_head_dim qk_rope_head_dim v_head_dim kv_channels",
    24: "q_lora_rank kv_lora_rank",
    128: "max_position_embeddings n_positions n_ctx max_sequence_length max_seq_len seq_length context_length",
    1: "n_group topk_group num_expert_group n_shared_experts num_nextn_predict_layers num_dense_layers "
    "first_k_dense_replace",
    VOCABULARY: "vocab_size",
}
_BY_NAME = {name: size for size, names in SIZES.items() for name in names.split()}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

_FOUR_LAYERS = {"num_hidden_layers": 4}
_ALL_HEADS = {"num_key_value_heads": 4}
_HEAD_DIM = {"head_dim": 8}
# What the sizes above do not settle.
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "qwen4_exp_text"], _FOUR_LAYERS),
    **dict.fromkeys(["axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"], _ALL_HEADS),
    **dict.fromkeys(["glm_moe_dsa", "longcat_flash", "minicpm3", "youtu", "esmc"], _ALL_HEADS),
    **dict.fromkeys(["hunyuan_v1_dense", "hunyuan_v1_moe", "ministral", "mixtral"], _HEAD_DIM),
    "bailing_hybrid": _FOUR_LAYERS,
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "deepseek_v2": {"num_experts_per_tok": 2, **_ALL_HEADS},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "ernie4_5_moe": {"moe_k": 2},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 0, "mask_token_id": 4},
    "funnel": {"block_sizes": [1, 1], "d_head": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8, "input_size": 32, "patch_size": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 48},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mistral4": {"qk_rope_head_dim": 4, **_ALL_HEADS},
    "nemotron": {"num_key_value_heads": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1},
}


def fields(kind: type[PretrainedConfig], model_type: str = "") -> dict[str, Any]:
    """The arguments of a configuration for a tiny model."""
    default = kind()
    given: dict[str, Any] = {}
    for name, part in (getattr(kind, "sub_configs", None) or {}).items():
        if isinstance(part, type) and issubclass(part, PretrainedConfig) and part is not AutoConfig:
            given[name] = fields(part, getattr(part, "model_type", ""))
        elif isinstance(inner := getattr(default, name, None), PretrainedConfig):
            given[name] = {**fields(type(inner), inner.model_type), "model_type": inner.model_type}
    for name, size in _BY_NAME.items():
        if isinstance(_default(default, name), int) and name not in (kind.attribute_map or {}):
            given[name] = size
    for name, token in _TOKENS.items():
        if isinstance(_default(default, name), int) or name == "pad_token_id":
            given[name] = token
    return {**given, **SPECIAL.get(model_type or kind.model_type, {})}


def _default(config: PretrainedConfig, name: str) -> Any:
    """A field's value; None where it cannot be set."""
    if isinstance(getattr(type(config), name, None), property):
        return None
    try:
        return getattr(config, name, None)
    except Exception:  # of fields that differ from layer to layer, or that an architecture does not have
        return None


def tiny_config(kind: type[PretrainedConfig]) -> PretrainedConfig:
    """A configuration of a few thousand values."""
    return kind(**fields(kind))


def model_kind(config: type[PretrainedConfig]) -> tuple[str, type[PreTrainedModel]] | None:
    """The head of an architecture and its class; None where it has none of `HEADS`."""
    for head, mapping in HEADS.items():
        if config in mapping:
            found = mapping[config]
            return head, found[0] if isinstance(found, tuple) else found
    return None


def tiny_model(config: type[PretrainedConfig], seed: int = 0) -> PreTrainedModel:
    """A random model in float32."""
    kind = model_kind(config)
    assert kind is not None
    made = tiny_config(config)
    torch.manual_seed(seed)
    try:
        model = kind[1](made)
    except AttributeError:  # the head is that of the text model
        model = kind[1](made.get_text_config())
    for part in (model.config, model.config.get_text_config()):
        part.use_cache = False
    if getattr(model.config, "is_encoder_decoder", False) and not hasattr(model.config, "decoder_start_token_id"):
        model.config.decoder_start_token_id = 1
    if getattr(model.config, "decoder_start_token_id", 1) is None:
        model.config.decoder_start_token_id = 1
    if hasattr(model, "set_default_language"):
        model.set_default_language("en_XX")
    return model.float().eval()


def inputs(model: PreTrainedModel, head: str) -> dict[str, Any]:
    """A batch with labels: [2, 12] tokens."""
    ids = torch.randint(5, VOCABULARY - 8, (2, 12), generator=torch.Generator().manual_seed(1))
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    if head == "classification":
        batch["labels"] = torch.tensor([0, 1])
    if model.main_input_name == "input_features":
        config = model.config
        bins, length = config.num_mel_bins, 2 * getattr(config, "max_source_positions", 64)
        batch["input_features"] = torch.randn(2, bins, length, generator=torch.Generator().manual_seed(2))
        batch.pop("input_ids")
    taken = inspect.signature(model.forward).parameters
    return {name: value for name, value in batch.items() if name in taken or name == "input_ids"}
