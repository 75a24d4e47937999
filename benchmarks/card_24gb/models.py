"""The frozen models of the 24 GB benchmark: shapes written out, random weights made where they are computed with."""

import importlib.util
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from meft.table.row_table import RowTable

_MISTRAL = (MistralForCausalLM, MistralConfig)
_LLAMA = (LlamaForCausalLM, LlamaConfig)
# vocabulary, d, FFN, layers, heads, key/value heads, longest input, window
SHAPES: dict[str, tuple[tuple[type, type], tuple[int | None, ...]]] = {
    "llama-2-7b": (_LLAMA, (32000, 4096, 11008, 32, 32, 32, 4096, None)),
    "mistral-7b": (_MISTRAL, (32000, 4096, 14336, 32, 32, 8, 32768, 4096)),
    # Of a dry run: nothing that is measured on it means anything.
    "tiny-llama": (_LLAMA, (128, 64, 128, 4, 4, 4, 128, None)),
    "tiny-mistral": (_MISTRAL, (128, 64, 192, 4, 4, 2, 128, 64)),
}


def config_of(name: str) -> Any:
    """The configuration of a model; rotary base 10,000 and norms' epsilon 1e-5 as published."""
    (_, kind), (vocabulary, d, ffn, layers, heads, kv_heads, longest, window) = SHAPES[name]
    fields = {} if window is None else {"sliding_window": window}
    return kind(
        vocab_size=vocabulary,
        hidden_size=d,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=longest,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        use_cache=False,
        **fields,
    )


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
    with torch.device("meta"):
        model = SHAPES[name][0][0](config_of(name))
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


@contextmanager
def filled_by_many() -> Iterator[None]:
    """Rows in host memory that are made inside are drawn by many generators at once: 839 M values at 7B."""
    seeds, plain = itertools.count(), RowTable.fill

    def draw(part: Tensor, std: float, seed: int) -> None:
        part.normal_(0, std, generator=torch.Generator().manual_seed(seed))

    def fill(table: RowTable, std: float | None) -> None:
        if std is None or not table.rows.is_cpu:
            plain(table, std)
        else:
            parts = table.rows.detach().split(256)
            list(pool.map(draw, parts, [std] * len(parts), itertools.islice(seeds, len(parts))))

    RowTable.fill = fill  # type: ignore[method-assign]
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            yield
    finally:
        RowTable.fill = plain  # type: ignore[method-assign]
