"""Adapters of the benchmarks of quality, each put on a fresh model."""

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from meft import MEFTConfig


class DenseParallelAdapter(nn.Module):
    """y = mlp(x) + relu(s x W1^T) W2 in fp32, no bias, s = 1: what MEFT is with nothing left out."""

    def __init__(self, mlp: nn.Module, width: int, r: int):
        super().__init__()
        self.mlp, self.scale = mlp, 1.0
        place = next(mlp.parameters()).device
        self.keys = nn.Parameter(torch.empty(r, width, dtype=torch.float32, device=place).normal_(std=0.02))
        self.values = nn.Parameter(torch.zeros(r, width, dtype=torch.float32, device=place))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = x.float() @ self.keys.T
        added = F.relu(scores if self.scale == 1.0 else self.scale * scores) @ self.values
        return self.mlp(x) + added.to(x.dtype)


def attach_dense(model: nn.Module, r: int) -> nn.Module:
    """Freeze `model` and place an adapter beside the MLP of every layer."""
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp = DenseParallelAdapter(layer.mlp, model.config.hidden_size, r)
    return model


def attach(model: nn.Module, kind: str, r: int, fields: dict) -> nn.Module:
    """The model with an adapter, of which only the adapter is trained.

    Args:
        kind: "lora" on all linear layers, "dense" beside each FFN, or "meft".
        fields: of `MEFTConfig`.
    """
    if kind == "dense":
        return attach_dense(model, r)
    if kind == "lora":
        config = LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", task_type="CAUSAL_LM")
    else:
        config = MEFTConfig(r=r, task_type="CAUSAL_LM", **fields)
    return get_peft_model(model, config)


def trainable_values(model: nn.Module) -> int:
    """Values that training may change, as the adapter itself counts them where it does."""
    if hasattr(model, "get_nb_trainable_parameters"):
        return model.get_nb_trainable_parameters()[0]
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
