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
    16: "moe_intermediate_size attention_hidden_size expert_intermediate_size index_head_dim",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers num_heads_kv "
    "num_encoder_layers num_key_value_heads encoder_num_key_value_heads decoder_num_key_value_heads "
    "num_experts_per_tok num_experts_per_token moe_top_k moe_topk num_shared_layers num_encoder_decoder_layers",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts",
    8: "head_dim d_kv rotary_dim qk_nope_head_dim qk_rope_head_dim v_head_dim kv_channels",
    24: "q_lora_rank kv_lora_rank",
    128: "max_position_embeddings n_positions n_ctx max_sequence_length max_seq_len seq_length context_length",
    1: "n_group topk_group num_expert_group n_shared_experts num_nextn_predict_layers num_dense_layers",
    VOCABULARY: "vocab_size",
}
_BY_NAME = {name: size for size, names in SIZES.items() for name in names.split()}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

# What the sizes above do not settle.
SPECIAL: dict[str, dict[str, Any]] = {}


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
        if isinstance(getattr(default, name, None), int) and name not in (kind.attribute_map or {}):
            given[name] = size
    for name, token in _TOKENS.items():
        if isinstance(getattr(default, name, None), int) or name == "pad_token_id":
            given[name] = token
    return {**given, **SPECIAL.get(model_type or kind.model_type, {})}


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
    torch.manual_seed(seed)
    model = kind[1](tiny_config(config))
    return model.float().eval()


def inputs(model: PreTrainedModel, head: str) -> dict[str, torch.Tensor]:
    """A batch with labels: [2, 12] tokens."""
    ids = torch.randint(5, VOCABULARY - 8, (2, 12), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    if head == "classification":
        batch["labels"] = torch.tensor([0, 1])
    taken = inspect.signature(model.forward).parameters
    return {name: value for name, value in batch.items() if name in taken or name == "input_ids"}
