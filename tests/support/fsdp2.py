"""FSDP2 by accelerate on the CPU, where accelerate itself takes DistributedDataParallel instead."""

import os
from contextlib import contextmanager

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def by_hand(model, layers=True, **options):
    """Shard a model of PEFT with `fully_shard`, each layer and then the rest, or all at once."""
    if layers:
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def whole(tensors):
    """What all ranks hold together."""
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in tensors.items()}


@contextmanager
def fsdp2_on_cpu(rank, world=2, **plugin):
    """In the block, an `Accelerator`, that of a Trainer too, shards on the CPU.

    Args:
        plugin: of `FullyShardedDataParallelPlugin`; None where a Trainer makes it.
    """
    before, init = dict(os.environ), AcceleratorState.__init__
    sizes = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {name: str(value) for name, value in sizes.items()} | {"FSDP_VERSION": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "1"}

    def started(self, *args, fsdp_plugin=None, **kwargs):
        fresh = AcceleratorState._shared_state == {}
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fresh and fsdp_plugin is not None:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = started
    forget()
    try:
        yield
    finally:
        AcceleratorState.__init__ = init
        forget()
        os.environ.clear()
        os.environ.update(before)


def forget():
    """Let accelerate begin anew."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def accelerator(mixed_precision="no", accumulation=1, **plugin):
    """An `Accelerator` that wraps each layer of a transformer."""
    forget()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", **plugin)
    return Accelerator(
        cpu=True, mixed_precision=mixed_precision, gradient_accumulation_steps=accumulation, fsdp_plugin=plugin
    )


def same_everywhere(tensors):
    """Whether all ranks have the same values, bit for bit."""
    for value in tensors.values():
        mine = value.detach().contiguous().view(-1).view(torch.uint8)
        first = mine.clone()
        torch.distributed.broadcast(first, 0)
        if not torch.equal(first, mine):
            return False
    return True
