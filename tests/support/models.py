"""Tiny models with random weights: of architectures of transformers, and a plain stack of numbered blocks."""

import torch
import transformers as tr
from torch import nn

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_GROUPED = _SIZES | {"num_key_value_heads": 1}
_GEMMA = _GROUPED | {"head_dim": 16}
_BERT = _SIZES | {"max_position_embeddings": 64}
_T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_heads": 2, "num_layers": 2}

# transformers' name of an architecture -> its configuration and sizes.
ARCHITECTURES = {
    "llama": ("LlamaConfig", _GROUPED),
    "mistral": ("MistralConfig", _GROUPED),
    "mixtral": ("MixtralConfig", _GROUPED | {"num_local_experts": 2}),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", _GEMMA),
    "gemma": ("GemmaConfig", _GEMMA),
    "gemma2": ("Gemma2Config", _GEMMA),
    "gemma3_text": ("Gemma3TextConfig", _GEMMA),
    "phi": ("PhiConfig", _SIZES),
    "phi3": ("Phi3Config", _SIZES | {"pad_token_id": 0}),
    "gpt2": ("GPT2Config", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "gpt_neox": ("GPTNeoXConfig", _SIZES),
    "bloom": ("BloomConfig", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 2}),
    "opt": ("OPTConfig", {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                          "vocab_size": 64, "word_embed_proj_dim": 32}),
    "bert": ("BertConfig", _BERT),
    "roberta": ("RobertaConfig", _BERT),
    "vit": ("ViTConfig", {"image_size": 8, "patch_size": 4, **_SIZES}),
    "t5": ("T5Config", _T5 | {"decoder_start_token_id": 0}),
}  # fmt: skip


def config(architecture, **fields):
    """The configuration of an architecture, tiny where `fields` do not say otherwise."""
    name, sizes = ARCHITECTURES[architecture]
    return getattr(tr, name)(**(sizes | fields))


def model(cls, dtype=torch.float32, seed=0, **fields):
    """A model of a class of transformers, in training mode; the seed decides its weights.

    Args:
        dtype: weights are drawn in float32, and cast.
    """
    torch.manual_seed(seed)
    return cls(config(cls.config_class.model_type, **fields)).to(dtype)


def llama(layers=2, dtype=torch.float32, seed=0, cls=tr.LlamaForCausalLM, **fields):
    """A language model that most tests adapt: d 32, two heads, 64 tokens."""
    return model(cls, dtype, seed, num_hidden_layers=layers, **fields)


def llama_of_0_1():
    """The base model of tests/fixtures/v0_1."""
    sizes = {"vocab_size": 96, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return llama(4, **sizes, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def gemma3_with_vision():
    """A language model of two layers beside one for images."""
    vision = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    fields = {"text_config": config("gemma3_text").to_dict(), "vision_config": vision, "mm_tokens_per_image": 4}
    return tr.Gemma3ForConditionalGeneration(tr.Gemma3Config(**fields))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q = nn.Linear(width, width)
        self.v = nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.v(torch.tanh(self.q(x))))


class Net(nn.Module):
    """Numbered blocks of two linear layers, q and v, and a head of three outputs."""

    def __init__(self, layers, width):
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)
