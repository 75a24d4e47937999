"""Quantised base weights for a trace: their bytes by arithmetic, and what is dequantised for a product and dropped.

As bitsandbytes stores them: NF4 in blocks of 64 weights with an absolute maximum each, these quantised to 8 bits in
blocks of 256 (double quantisation); int8 with one scale a row. The output layer, embeddings and norms stay in bf16.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from aslora_meft.errors import UsageError
from aslora_meft.planner.live import MemoryTracker

QUANTISED = ("nf4", "int8")
_BLOCK, _OUTER = 64, 256


def quantised_bytes(weight: Tensor, kind: str) -> int:
    """Bytes of a weight [out, in] with all that is stored beside it."""
    n = weight.numel()
    if kind == "int8":
        return n + 4 * len(weight)
    blocks = -(-n // _BLOCK)
    code = 16 * 4 + 256 * 4 + 4  # both tables, and the mean of the maxima
    return -(-n // 2) + blocks + 4 * -(-blocks // _OUTER) + code


class _Product(torch.autograd.Function):
    """x W^T with a W that exists only while it is multiplied, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.kind = kind
        if kind == "int8":  # int8 products of a quantised x, summed in int32
            quantised = torch.empty_like(x, dtype=torch.int8)
            sums = x.new_empty(*x.shape[:-1], len(weight), dtype=torch.int32)
            if MemoryTracker.current is not None:
                MemoryTracker.current.note_flops(2 * quantised.numel() * len(weight))
            return torch.empty_like(sums, dtype=x.dtype)
        return x @ _dequantised(weight, x).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return grads[0] @ _dequantised(weight, grads[0]), None, None


def _dequantised(weight: Tensor, like: Tensor) -> Tensor:
    maxima = like.new_empty(-(-weight.numel() // _BLOCK), dtype=torch.float32)
    del maxima
    return torch.empty_like(weight, dtype=like.dtype)


def _forward(module: nn.Linear, kind: str, x: Tensor) -> Tensor:
    y: Tensor = _Product.apply(x, module.weight, kind)  # type: ignore[no-untyped-call]
    return y if module.bias is None else y + module.bias


def quantise(model: PreTrainedModel, kind: str) -> dict[int, int]:
    """Let the model's linear layers, but for its output layer, compute as if they were quantised.

    Their weights stay meta tensors of the model's dtype, which adapters ask for shape and dtype.

    Returns:
        id of a weight -> the bytes that it stands for.

    Raises:
        UsageError: there is no linear layer.
    """
    found: dict[int, int] = {}
    head = model.get_output_embeddings()
    linear: Any
    for linear in [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]:
        found[id(linear.weight)] = quantised_bytes(linear.weight, kind)
        linear.forward = partial(_forward, linear, kind)
    if not found:
        raise UsageError(f"dtype={kind!r} quantises linear layers, and the model has none; use bfloat16")
    return found
