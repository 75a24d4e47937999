"""Over which ranks the gradients of a pass are averaged: those of DistributedDataParallel, or of FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..torch_private import (
    active_ddp,
    fsdp2_divides_by_ranks,
    fsdp2_mesh,
    fsdp2_parameter_groups,
    fsdp2_synchronises,
    fsdp2_unit_around,
)


@dataclass(frozen=True)
class DataParallel:
    """What averages the gradients of the parameters beside the modules that are `around`'s business.

    Attributes:
        engine: the `DistributedDataParallel`, or the `FSDPModule`; with another one, the ranks may begin with other
            parameters.
        group: of the ranks.
        synchronises: whether a backward pass averages gradients now (`no_sync`, `set_requires_gradient_sync`). Where it
            averages what earlier passes have accumulated, part of which is averaged already, the result is the same:
            that part is equal on all ranks.
    """

    engine: nn.Module
    group: dist.ProcessGroup
    synchronises: Callable[[], bool]

    def on_device(self) -> AbstractContextManager[Any]:
        """As the function of this name, for the engine."""
        return on_device(self.engine)


def on_device(engine: nn.Module) -> AbstractContextManager[Any]:
    """A block in which the current GPU is that of the engine's parameters, if they are on one.

    Collectives of NCCL take the current GPU, and nobody has to set it for DDP with `device_ids`.
    """
    device = next((p.device for p in engine.parameters() if p.device.type == "cuda"), None)
    return nullcontext() if device is None else torch.cuda.device(device)


def around(modules: Iterable[nn.Module]) -> DataParallel | None:
    """What averages gradients around modules whose parameters it leaves alone, in the forward pass of this thread.

    Args:
        modules: of a class that is `left_alone_by_fsdp2`, those that do not train too.

    Returns:
        None where each rank trains by itself.

    Raises:
        RuntimeError: FSDP2 does not shard over the same ranks around all that train, or gives them another gradient
            than the mean.
    """
    if not dist.is_available() or not dist.is_initialized():
        return None
    ddp = active_ddp()
    if ddp is not None:
        synchronises = bool(ddp.require_backward_grad_sync)  # which counts in the forward pass
        return DataParallel(ddp, ddp.process_group, lambda: synchronises)
    units = [(module, fsdp2_unit_around(module)) for module in modules]
    sharded = [unit for _, unit in units if unit is not None]
    if not sharded:
        return None
    trained = [unit for module, unit in units if any(p.requires_grad for p in module.parameters())] or sharded
    groups = [next(iter(fsdp2_parameter_groups(unit)), None) if unit is not None else None for unit in trained]
    first = groups[0]
    if first is None or any(group is None or fsdp2_mesh(group) != fsdp2_mesh(first) for group in groups):
        raise RuntimeError(
            "FSDP2 does not shard all layers of this adapter over the same ranks: add adapters before fully_shard, and "
            "call it with one mesh for all layers."
        )
    if not all(map(fsdp2_divides_by_ranks, groups)):
        raise RuntimeError(
            "FSDPModule.set_gradient_divide_factor does not reach the parameters that FSDP2 leaves alone (MEFT rows): "
            "scale the loss instead."
        )
    return DataParallel(trained[0], _group_of(fsdp2_mesh(first)), lambda: fsdp2_synchronises(first))


_groups: dict[Any, dist.ProcessGroup] = {}  # of meshes with two dimensions, which have no group of all ranks


def _group_of(mesh: Any) -> dist.ProcessGroup:
    """All ranks of a mesh; they all come here the first time."""
    if mesh.ndim == 1:
        return mesh.get_group()
    ranks = mesh.mesh.flatten().tolist()
    if ranks == list(range(dist.get_world_size())):
        return dist.group.WORLD  # type: ignore[return-value]
    key = (tuple(ranks), dist.group.WORLD)
    if key not in _groups:
        _groups[key] = dist.new_group(ranks, use_local_synchronization=True)
    return _groups[key]
