"""Tensors that FSDP2 or DeepSpeed may hold in parts: read whole, and written."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from peft_bridge.deepspeed_private import ZeroSteps, is_partitioned


def full_tensor(tensor: Tensor, zero: ZeroSteps | None = None) -> Tensor:
    """The full tensor without autograd, gathered over ranks if it is sharded.

    Args:
        zero: steps a copy of it, which is read then: it may be more precise.
    """
    if zero is not None:
        return zero.read(tensor)
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach()


class HeldB(nn.Module):
    """A stacked B that an engine may hold.

    Attributes:
        zero: DeepSpeed's steps of a copy of B; None: there is none.
    """

    stacked_B: nn.Parameter
    diagonal: nn.Parameter | None
    zero: ZeroSteps | None = None

    @property
    def compared(self) -> bool:
        """Whether the rows can be compared here: not on the meta device, nor where a rank holds a part of them."""
        return not (self.stacked_B.is_meta or isinstance(self.stacked_B, DTensor) or is_partitioned(self.stacked_B))

    @property
    def held_elsewhere(self) -> bool:
        """Whether B is not, or not alone, what this rank reads."""
        return isinstance(self.stacked_B, DTensor) or (self.zero is not None and self.zero.alive)

    def full_tensor(self) -> Tensor:
        """The full B [n, out_features, r] without autograd, as precise as it is stepped."""
        return full_tensor(self.stacked_B, self.zero)

    def overwrite(self, whole: Tensor) -> None:
        """Write the full B into shards, or into what DeepSpeed steps."""
        if isinstance(self.stacked_B, DTensor):
            overwrite(self.stacked_B, whole)
        elif self.zero is not None:
            self.zero.write(self.stacked_B, whole)


def sharded_like(like: DTensor, whole: Tensor) -> Tensor:
    """A full tensor, that each rank has, as shards like those of another; no communication."""
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def overwrite(target: DTensor, whole: Tensor) -> None:
    """Write a full tensor into shards."""
    target.copy_(sharded_like(target, whole))
