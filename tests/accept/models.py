"""Tiny random models under the names of the hub's models that PEFT's tests ask for: they run without a network."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as tf
from peft import LoraConfig
from torch import nn

_SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 1024}
_BERT = {**_SMALL, "intermediate_size": 32, "max_position_embeddings": 64}
_LLAMA = {**_SMALL, "intermediate_size": 32, "num_key_value_heads": 2, "max_position_embeddings": 128}
_OPT = {**_SMALL, "ffn_dim": 4, "word_embed_proj_dim": 16, "max_position_embeddings": 128}
_WIDE = {"hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 128, "num_hidden_layers": 12}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 1024, "n_positions": 128}
_BART = {
    "d_model": 16,
    "vocab_size": 1024,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 128,
}
_T5 = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 1024}
_END = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}

# Name on the hub -> (class, config).
MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (tf.OPTForCausalLM, tf.OPTConfig(**_OPT, **_END)),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": (tf.GPT2LMHeadModel, tf.GPT2Config(**_GPT2, **_END)),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": (tf.LlamaForCausalLM, tf.LlamaConfig(**_LLAMA, **_END)),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": (tf.LlamaForCausalLM, tf.LlamaConfig(**_LLAMA, **_END)),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        tf.BartForConditionalGeneration,
        tf.BartConfig(**_BART, **_END, decoder_start_token_id=2, forced_eos_token_id=3),
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        tf.T5ForConditionalGeneration,
        tf.T5Config(**_T5, decoder_start_token_id=0, pad_token_id=0, eos_token_id=3, initializer_factor=2.0),
    ),
    "peft-internal-testing/tiny-random-BertModel": (tf.BertModel, tf.BertConfig(**_BERT)),
    "peft-internal-testing/tiny-random-RobertaModel": (tf.RobertaModel, tf.RobertaConfig(**_BERT)),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        tf.GPTJForCausalLM,
        tf.GPTJConfig(**_GPT2, **_END, rotary_dim=4),
    ),
    "hf-internal-testing/tiny-random-gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config(**_GPT2, **_END)),
    "hf-internal-testing/tiny-random-MistralForCausalLM": (
        tf.MistralForCausalLM,
        tf.MistralConfig(**_LLAMA, **_END, sliding_window=16),
    ),
    "peft-internal-testing/tiny-dummy-qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config(**_LLAMA, **_END)),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        tf.Gemma3ForCausalLM,
        tf.Gemma3TextConfig(**_LLAMA, **_END, head_dim=8, sliding_window=16),
    ),
    "peft-internal-testing/tiny-random-DebertaModel": (tf.DebertaModel, tf.DebertaConfig(**_BERT)),
    "peft-internal-testing/tiny-random-DebertaV2Model": (tf.DebertaV2Model, tf.DebertaV2Config(**_BERT)),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        tf.RobertaForSequenceClassification,
        tf.RobertaConfig(**_BERT),
    ),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        tf.BertForSequenceClassification,
        tf.BertConfig(**_BERT),
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        tf.LlamaForSequenceClassification,
        tf.LlamaConfig(**_LLAMA, **_END),
    ),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        tf.BloomForCausalLM,
        tf.BloomConfig(hidden_size=16, n_layer=5, n_head=4, vocab_size=1024),
    ),
    # PEFT counts its 24 layers
    "peft-internal-testing/opt-125m": (
        tf.OPTForCausalLM,
        tf.OPTConfig(**{**_OPT, **_WIDE}, **_END),
    ),
    "google/flan-t5-small": (tf.T5Model, tf.T5Config(**_T5)),
    "bert-base-uncased": (tf.BertForSequenceClassification, tf.BertConfig(**_BERT)),
}
# The config that PEFT's config tests load from the hub.
CONFIG = "peft-internal-testing/tiny-opt-lora-revision"


def build(folder: Path) -> None:
    """Write all models below `folder`: from there, their names on the hub are paths."""
    tf.utils.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()
    for name, (cls, config) in MODELS.items():
        torch.manual_seed(0)
        cls(config).save_pretrained(folder / name)
    LoraConfig(base_model_name_or_path="none", target_modules=["q_proj"]).save_pretrained(folder / CONFIG)


class Deep(nn.Module):
    """Four equal blocks, for layers that share."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Module()  # PEFT looks for layer indices below a prefix
        self.body.layers = nn.ModuleList(
            [nn.ModuleDict({"lin0": nn.Linear(10, 16), "lin1": nn.Linear(16, 10)}) for _ in range(4)]
        )
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(10, 2)
        self.dtype = torch.float

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        X = X.to(self.dtype) / 90
        for layer in self.body.layers:
            X = X + layer["lin1"](torch.relu(layer["lin0"](X)))
        return self.head(self.drop(X)).log_softmax(-1)


def with_ffns(model: nn.Module) -> nn.Module:
    """PEFT's MLP with an FFN in place of each `lin0`: MEFT stands beside FFNs, not beside single layers."""
    for block in getattr(model, "layers", [model]):
        width = block.lin0.in_features
        block.lin0 = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        block.lin1 = nn.Linear(width, block.lin1.out_features)
    return model
