"""The methods that `benchmarks.meft_recall` compares, each put on a fresh model by `Method.attach`."""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

# Three each; where the best of a first three was the highest, the grid was moved up.
LORA_RATES = {8: (3e-3, 1e-2, 3e-2), 64: (3e-4, 1e-3, 3e-3)}
ADAPTER_RATES = (1e-3, 3e-3, 1e-2)


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


def has_meft() -> bool:
    """Whether this installation has MEFT; without it its rows are missing, and the others run."""
    try:
        from meft import MEFTConfig  # noqa: F401
    except ImportError:
        return False
    return True


@dataclass(frozen=True)
class Method:
    """One row of the table: which adapter, at which width, and the learning rates to choose from."""

    name: str
    kind: str
    r: int
    rates: tuple[float, ...]
    fields: dict = field(default_factory=dict)

    def settings(self) -> dict:
        """What a row depends on beside the task; `rates` belongs to the choice, not to a run."""
        return {"kind": self.kind, "r": self.r, "fields": self.fields}

    def with_one_rate(self) -> "Method":
        """The same with the middle rate alone, for a run with no time to choose."""
        return replace(self, rates=self.rates[len(self.rates) // 2 :][:1])

    def attach(self, model: nn.Module) -> nn.Module:
        """The model with this adapter, of which only the adapter is trained."""
        if self.kind == "untrained":
            return model
        if self.kind == "dense":
            return attach_dense(model, self.r)
        if self.kind == "lora":
            config = LoraConfig(r=self.r, lora_alpha=2 * self.r, target_modules="all-linear", task_type="CAUSAL_LM")
        else:
            from meft import MEFTConfig

            config = MEFTConfig(r=self.r, task_type="CAUSAL_LM", **self.fields)
        return get_peft_model(model, config)


def trainable_values(model: nn.Module) -> int:
    """Values that training may change, as the adapter itself counts them where it does."""
    if hasattr(model, "get_nb_trainable_parameters"):
        return model.get_nb_trainable_parameters()[0]
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


UNTRAINED = Method("no adapter", "untrained", 0, ())
METHODS = [
    *(Method(f"LoRA r {r}", "lora", r, rates) for r, rates in LORA_RATES.items()),
    Method("dense r 4096", "dense", 4096, ADAPTER_RATES),
    *(
        Method(f"MEFT r {r}", "meft", r, ADAPTER_RATES, {"experts_per_token": 8, "top_k": 64})
        for r in (1024, 4096, 8192)
    ),
]
