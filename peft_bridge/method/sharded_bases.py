"""Base models whose parameters other ranks hold parts of, before there is an adapter."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import DTensor


def refuse_sharded(model: nn.Module, method: str) -> None:
    """Check that a base model is whole: an adapter of parts would train and be saved without a word, and be wrong.

    Raises:
        ValueError: it was loaded with tensor parallelism, or sharded before the adapter was added.
    """
    ranks = getattr(model, "tp_size", None)  # of transformers' models
    if ranks is not None and ranks > 1:
        raise ValueError(
            f"{method} does not support tensor parallelism, and the model was loaded with tp_size={ranks}: load it "
            "without tp_plan, and train by DistributedDataParallel, or spread its layers by device_map."
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and any(not placement.is_replicate() for placement in parameter.placements):
            raise ValueError(
                f"{method} cannot adapt a model that is sharded already ('{name}' is a DTensor, "
                f"{parameter.placements}): add the adapter to the whole model first, and call fully_shard then."
            )
