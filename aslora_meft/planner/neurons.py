"""MEFT in a trace: stands beside the FFNs, holds the bytes that `meft.cost.memory` says, and computes nothing.

The method itself cannot run on the meta device, where no token can pick a neuron: how many rows an operation takes is
data there. So the plan's |U| stands in for the picks, with the lifetimes that the real tensors have: picks and saved
rows from the first forward pass to the backward pass of their layer, also through recomputation; temporaries within
it; tables and buffers always. Only the router is a parameter here, so its gradient and moments are traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from aslora_meft.planner.live import MemoryTracker
from meft.cost.memory import Plan
from meft.ffn_call import FFNCall


class _Neurons(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, router: Tensor, ffn: PlannedFFN) -> Tensor:
        live, plan = _live(), ffn.plan
        if ffn.kept is None:
            ffn.kept = [live.allocate(plan.saved_rows(), "saved rows"), live.allocate(plan.picks(), "activations")]
        live.allocate(plan.forward_temporaries(), "activations")
        ctx.save_for_backward(x, router)
        ctx.ffn = ffn
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, router = ctx.saved_tensors
        live, ffn = _live(), ctx.ffn
        if ffn.plan.way.updates_on_device and ffn.gradient is None:  # of a whole step: the most there can be
            ffn.gradient = live.allocate(ffn.plan.row_gradients() // ffn.plan.shape.layers, "gradients")
        temporaries = live.allocate(ffn.plan.backward_temporaries(), "activations")
        found = torch.empty_like(x), torch.empty_like(router), None
        del temporaries
        ffn.kept = None
        return found


def _live() -> MemoryTracker:
    assert MemoryTracker.current is not None
    return MemoryTracker.current


class PlannedFFN(nn.Module):
    """FFN(x) and what the neurons add.

    Args:
        width: hidden size d. up: as in `FFNCall`.

    Attributes:
        kept: what waits for the backward pass.
        gradient: row gradients that wait for the optimizer step, on the device.
    """

    def __init__(self, base_layer: nn.Module, plan: Plan, width: int, up: nn.Module | None) -> None:
        super().__init__()
        self.base_layer, self.plan = base_layer, plan
        self.meft_router = nn.Parameter(torch.empty(plan.shape.experts, width, dtype=torch.float32, device="meta"))
        self.kept: list[Tensor] | None = None
        self.gradient: Tensor | None = None
        self.call = FFNCall(base_layer, up, self._begin)

    def _begin(self, x: Tensor) -> Callable[[], Tensor]:
        added: Tensor = _Neurons.apply(x, self.meft_router, self)  # type: ignore[no-untyped-call]
        return lambda: added

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As `MEFTLayer`."""
        return self.call(self.base_layer, args, kwargs)


def lasting_bytes(plan: Plan) -> dict[str, int]:
    """Part -> bytes that the plan holds on the device through the whole step, beside the routers' own."""
    stay = plan.way.updates_on_device
    return {
        "adapter": plan.way.tables(plan.shape),
        "key buffers": plan.way.buffers(plan.shape),
        "buffers": plan.row_buffers() + (0 if stay else plan.row_gradients()),
        "optimizer": plan.shape.moments if stay else 0,
        "hot rows": plan.places(),
    }
