"""The adapters' routers of one layer: modules, so that their tensors are called `meft_router.<adapter>.weight`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..transport.offload_hooks import KeptParameters


class Router(KeptParameters):
    """W_g of one adapter.

    Attributes:
        weight: [E, d].
    """

    def __init__(self, experts: int, width: int, dtype: torch.dtype, device: str = "cpu") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width, dtype=dtype, device=device))

    def extra_repr(self) -> str:
        """Experts and width."""
        return ", ".join(map(str, self.weight.shape))


class Routers(nn.ModuleDict):
    """Adapter -> its `Router`. Loads tensors of 0.1 too, which were called `meft_router.<adapter>`."""

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in self:
            if f"{prefix}{name}" in state_dict:
                state_dict[f"{prefix}{name}.weight"] = state_dict.pop(f"{prefix}{name}")
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Untrained(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return torch.zeros_like(g)


def untrained(weight: Tensor) -> Tensor:
    """A weight that gets a gradient of zero: DistributedDataParallel needs parameters that get one."""
    found: Tensor = _Untrained.apply(weight)
    return found
