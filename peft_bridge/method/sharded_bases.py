"""Base models of which each rank holds a part before there is an adapter."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor


def refuse_sharded(model: nn.Module, config: Any) -> None:
    """Check that a base model is whole: what is added to parts would train and be saved without a word, and be wrong.

    Args:
        config: of the adapter.

    Raises:
        ValueError: the model was loaded with tensor parallelism, or is sharded already and the adapter is to train.
    """
    ranks = getattr(model, "tp_size", None)  # of transformers' models
    if ranks is not None and ranks > 1:
        raise ValueError(
            f"{config.method} does not support tensor parallelism, and the model was loaded with tp_size={ranks}: load "
            "it without tp_plan, and train by DistributedDataParallel or FSDP2, or spread its layers by device_map."
        )
    if config.inference_mode:
        return
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and any(not placement.is_replicate() for placement in parameter.placements):
            raise ValueError(
                f"The base model is sharded already ('{name}' is a DTensor with {parameter.placements}), and gradients "
                f"of a {config.method} adapter would not be averaged: add the adapter before fully_shard, or load it "
                "with is_trainable=False."
            )
