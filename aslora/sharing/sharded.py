"""Tensors that FSDP2 or DeepSpeed may hold in parts: read whole, and written."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from peft_bridge.deepspeed_private import ZeroSteps


def full_tensor(tensor: Tensor, zero: ZeroSteps | None = None) -> Tensor:
    """The full tensor without autograd, gathered over ranks if it is sharded.

    Args:
        zero: steps a copy of it, which is read then: it may be more precise.
    """
    if zero is not None:
        return zero.read(tensor)
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach()


def sharded_like(like: DTensor, whole: Tensor) -> Tensor:
    """A full tensor, that each rank has, as shards like those of another; no communication."""
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def overwrite(target: DTensor, whole: Tensor) -> None:
    """Write a full tensor into shards."""
    target.copy_(sharded_like(target, whole))
