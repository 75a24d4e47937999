"""What the counters of an adapter say of its routing: load of the experts, |U| / r, and experts never picked."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Counts:
    """The counters of all layers at one moment.

    Attributes:
        load: picks of neurons of each expert, int64 [layers, E].
        union: sum of |U| over the forward passes, float64 [layers].
        forwards: forward passes.
        r: neurons a layer.
    """

    load: Tensor
    union: Tensor
    forwards: int
    r: int

    def __sub__(self, before: "Counts") -> "Counts":
        return Counts(self.load - before.load, self.union - before.union, self.forwards - before.forwards, self.r)

    @property
    def union_share(self) -> Tensor:
        """Mean of |U| / r over the forward passes, [layers]."""
        return self.union / (self.forwards * self.r)


def counts(model: torch.nn.Module) -> Counts:
    """The counters of a model with MEFT now."""
    report = model.base_model.transfer_report()
    layers = list(report.layers.values())
    load = [layer.expert_load if layer.forwards else torch.zeros(layer.experts, dtype=torch.int64) for layer in layers]
    union = torch.tensor([layer.union_rows for layer in layers], dtype=torch.float64)
    return Counts(torch.stack(load), union, layers[0].forwards, report.r)


def perplexity(load: Tensor) -> Tensor:
    """exp of the entropy of each layer's load, over the number of experts: 1 where it is even, 1 / E where one expert
    gets all; int64 [layers, E] to float64 [layers]."""
    share = load.double() / load.sum(1, keepdim=True)
    return torch.special.entr(share).sum(1).exp() / load.shape[1]


def busiest(load: Tensor) -> Tensor:
    """The busiest expert's share of the picks, times the number of experts; [layers, E] to float64 [layers]."""
    return load.max(1).values.double() / load.sum(1) * load.shape[1]


def never(picked: Tensor) -> Tensor:
    """Share of the experts of which no neuron was picked; bool [layers, E] to float64 [layers]."""
    return 1 - picked.double().mean(1)
