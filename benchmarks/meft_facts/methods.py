"""The methods of `benchmarks.meft_facts`."""

from dataclasses import dataclass, field

import torch
from torch import nn

from benchmarks.language.adapters import attach, trainable_values
from benchmarks.meft_facts.rules import RULES, RowsByTorch

KINDS = ("lora", "dense", "meft", "full")


@dataclass(frozen=True)
class Method:
    """A row of the table. Those with a lower `turn` run first.

    Attributes:
        kind: "lora" on all linear layers, "dense" for an adapter beside each FFN without routing, "meft", or "full" for
            fine-tuning of the whole model, whose r is 0.
        scale: of a dense adapter, by which its scores are multiplied before ReLU.
        fields: of `MEFTConfig`.
        rule: which optimizer steps MEFT's rows: MEFT's own ("rows"), or one of `rules.RULES`.
        rates: that are tried first, where they are not those of all methods.
    """

    name: str
    turn: int
    kind: str
    r: int
    scale: float = 1.0
    fields: dict = field(default_factory=dict)
    rule: str = "rows"
    rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.name}: kind='{self.kind}' must be one of {KINDS}.")
        if self.rule not in ("rows", *RULES):
            raise ValueError(f"{self.name}: rule='{self.rule}' must be one of {('rows', *RULES)}.")
        if (self.scale != 1.0 and self.kind != "dense") or (
            (self.fields or self.rule != "rows") and self.kind != "meft"
        ):
            raise ValueError(f"{self.name}: scale is of kind 'dense', fields and rule of kind 'meft'.")
        if (self.kind == "full") != (self.r == 0):
            raise ValueError(f"{self.name}: r={self.r} must be 0 for kind 'full', and positive for the others.")
        object.__setattr__(self, "rates", tuple(self.rates))

    @property
    def settings(self) -> dict:
        """What a row depends on."""
        return {"kind": self.kind, "r": self.r, "scale": self.scale, "fields": self.fields, "rule": self.rule}

    def attach(self, model: nn.Module) -> nn.Module:
        """The model with this adapter, of which only the adapter is trained; of kind "full" all of the model is."""
        if self.kind == "full":
            return model.requires_grad_(True)
        adapted = attach(model, self.kind, self.r, self.fields)
        if self.kind == "dense":
            for layer in adapted.model.layers:
                layer.mlp.scale = self.scale
        return adapted

    def optimizer(self, groups: list[dict]) -> torch.optim.Optimizer:
        """Steps the adapter, without weight decay."""
        if self.rule == "rows":
            return torch.optim.AdamW(groups, weight_decay=0.0)
        return RowsByTorch(groups, self.rule)


def described(model: nn.Module) -> dict:
    """Values that are trained."""
    values = trainable_values(model)
    return {"values_start": values, "values_end": values}
