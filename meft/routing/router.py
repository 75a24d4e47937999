"""The adapters' routers of one layer: modules, so that their tensors are called `meft_router.<adapter>.weight`."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
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


def freeze_router(layer: BaseTunerLayer, adapter_name: str) -> None:
    """Train the router of an adapter no more, whatever PEFT makes trainable."""
    layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, adapter_name: ("meft_router",)}
    for weight in layer.meft_router[adapter_name].parameters():
        weight.requires_grad_(False)
        weight.grad = None
