"""A chain of adapted layers over small integers, in which every sum is exact: equal is equal bit for bit.

Between layers values, and gradients on their way back, are folded into -2 to 1, so that nothing grows past what float32
holds exactly. AdamW with betas of 0 steps down the sign of a gradient, so that integers stay integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from meft import MEFTConfig
from meft.transport.streams import DeviceStreams

STRATEGIES = MEFTConfig.choices["retrieval"][1:]
WIDTH, R, LAYERS, TOKENS, STEPS = 64, 128, 3, 32, 3
EXACT = 2.0**24  # float32 has all integers up to it
SIGN = {"lr": 1.0, "betas": (0.0, 0.0), "eps": 1e-30, "weight_decay": 0.0}


@dataclass(frozen=True)
class Setting:
    """One way to train the chain.

    Attributes:
        strategy: "resident": rows on the device; "": no engine, rows are read in place.
        checkpointing: "", "reentrant" or "non-reentrant".
        compute_dtype: dtype in which rows are read.
    """

    strategy: str = ""
    rows: str = "save"
    checkpointing: str = ""
    in_backward: bool = False
    zero_copy: bool = False
    compute_dtype: str = "bfloat16"
    accumulation: int = 1

    def title(self) -> str:
        words = [
            self.strategy,
            self.rows,
            self.checkpointing and f"{self.checkpointing} checkpoints",
            self.compute_dtype,
        ]
        words += ["in_backward"] * self.in_backward + ["zero_copy"] * self.zero_copy
        return ", ".join(filter(None, words)) + f", x{self.accumulation}" * (self.accumulation > 1)

    def fields(self) -> dict[str, Any]:
        """Of `MEFTConfig`."""
        if not self.strategy:
            return {"row_dtype": self.compute_dtype}
        if self.strategy == "resident":
            return {"placement": "device", "row_dtype": self.compute_dtype}
        options = {"in_backward": self.in_backward, "zero_copy": self.zero_copy}
        return {
            "retrieval": self.strategy, "backward_rows": self.rows, "row_dtype": self.compute_dtype,
            "row_optimizer": options,
        }  # fmt: skip


def settings() -> list[Setting]:
    """strategy x save or refetch x checkpointing x in_backward x zero_copy, then what these leave out."""
    grid = product(STRATEGIES, ("save", "refetch"), ("", "reentrant", "non-reentrant"), (False, True), (False, True))
    found = [Setting(*each) for each in grid]
    found += [
        Setting(s, rows, compute_dtype="float32", zero_copy=True) for s in STRATEGIES for rows in ("save", "refetch")
    ]
    found += [Setting(s, "save", accumulation=2) for s in STRATEGIES]
    return found + [Setting("resident"), Setting("resident", checkpointing="non-reentrant")]


class Identity(nn.Module):
    """In the place of the base FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.clone()


class Fold(torch.autograd.Function):
    """Whole numbers into -2 to 1, their gradient too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.remainder(4) - 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].remainder(4) - 2


def adapted(setting: Setting, dtype: torch.dtype = torch.float32, layers: int = LAYERS) -> Any:
    """The model on the CPU, its tables and routers of -1, 0 and 1; the same for all settings."""
    shape = {"vocab_size": 8, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": layers}
    base = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1)).to(dtype)
    fields = {"r": R, "num_experts": 16, "experts_per_token": 4, "top_k": 8, "init_weights": False}
    if dtype == torch.float64:
        fields |= {"master_dtype": "float64"}
    model = get_peft_model(base, MEFTConfig(**fields, **setting.fields()))
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randint(-1, 2, parameter.shape, generator=chance))
    for layer in model.base_model.adapted_ffns().values():
        layer.base_layer = Identity().to(dtype)
    return model


def whole_numbers(seed: int, dtype: torch.dtype, tokens: int = TOKENS) -> Tensor:
    """[1, tokens, WIDTH] of -2 to 1."""
    chance = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 2, (1, tokens, WIDTH), generator=chance).to(dtype)


def use(model: Any, streams: DeviceStreams | None) -> Any:
    """The model whose engines have these streams; None: those of the device."""
    for engine in model.base_model.engines.values() if streams is not None else ():
        engine.use(streams)
    return model


def tables_of(model: Any) -> list[Any]:
    """Keys and values of all layers."""
    return [table for found in model.base_model.steps.tables.values() for table in found]


def stepping(model: Any) -> torch.optim.Optimizer:
    """The optimizer that steps down signs."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **SIGN)


def passed(model: Any, x: Tensor, checkpointing: str = "") -> Tensor:
    """x through the chain."""
    for layer in model.base_model.adapted_ffns().values():
        y = checkpoint(layer, x, use_reentrant=checkpointing == "reentrant") if checkpointing else layer(x)
        x = Fold.apply(y)
    return x


def weighed(y: Tensor) -> Tensor:
    """The loss: small whole numbers as weights."""
    weights = torch.arange(y[0].numel(), device=y.device).reshape(y[0].shape) % 5 - 2
    return (y * weights.to(y.dtype)).sum()


def train(
    model: Any, optimizer: torch.optim.Optimizer, setting: Setting, steps: Sequence[int], tokens: int = TOKENS
) -> list[Tensor]:
    """Outputs, gradients of the inputs and of the routers of some steps, which say by their numbers what they see."""
    frozen = next(p for p in model.parameters() if not p.requires_grad)
    routers = [p for name, p in model.named_parameters() if p.requires_grad and "router" in name]
    seen: list[Tensor] = []
    for step in steps:
        for micro in range(setting.accumulation):
            x = whole_numbers(10 * step + micro, frozen.dtype, tokens).to(frozen.device).requires_grad_()
            y = passed(model, x, setting.checkpointing)
            weighed(y).backward()
            assert x.grad is not None
            seen += [y.detach(), x.grad]
        seen += [p.grad.clone() for p in routers if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    return seen


def end(model: Any) -> list[Tensor]:
    """Tables and moments."""
    seen = []
    for table in tables_of(model):
        table.synchronize()
        seen.append(table.rows.detach().clone())
        if table.moments is not None:  # None: no step was taken, for a gradient was not finite
            seen += [table.moments.exp_avg.clone(), table.moments.counts.clone()]
    return seen


def trained(
    setting: Setting,
    device: torch.device,
    streams: DeviceStreams | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    layers: int = LAYERS,
    tokens: int = TOKENS,
    steps: int = STEPS,
) -> list[Tensor]:
    """What `train` and `end` give of some steps, on the CPU.

    Args:
        streams: the engine's; None: those of the device.
    """
    model = use(adapted(setting, dtype, layers).to(device), streams)
    seen = train(model, stepping(model), setting, range(steps), tokens)
    return [tensor.detach().cpu() for tensor in [*seen, *end(model)]]


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    """The first tensor that differs, as text; "" where none does."""
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=False)):
        if ours.shape != theirs.shape:
            return f"tensor {i} is {list(ours.shape)}, not {list(theirs.shape)}"
        wrong = int((ours != theirs).sum())
        if wrong:
            return f"tensor {i} of {len(found)}: {wrong} of {theirs.numel()} values differ"
    return "" if len(found) == len(expected) else f"{len(found)} tensors in place of {len(expected)}"


def require_exact(expected: Sequence[Tensor], wide: Sequence[Tensor]) -> None:
    """Raises: AssertionError: float64 has other values, or float32 is near its limit: the chain tells nothing."""
    said = difference([x.double() for x in expected], [x.double() for x in wide])
    assert not said, f"float32 rounds: {said}"
    largest = max(float(x.abs().max()) for x in expected)
    assert largest < EXACT / 4, f"values up to {largest:.3g} leave no room for exact sums"
