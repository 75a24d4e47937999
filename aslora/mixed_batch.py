"""Mixed batches: each sample of a batch names its own adapter."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .layer import ASLoRALayer


def check_names_of_samples(adapter_names: Sequence[str], adapters: Container[str], training: bool) -> None:
    """Raises: ValueError: the model trains, or has no adapter of such a name."""
    if training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    unknown = {name for name in adapter_names if name != "__base__" and name not in adapters}
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")


@contextmanager
def adapters_per_sample(
    tuner: nn.Module, model: nn.Module, adapter_names: list[str], num_beams: int | None
) -> Iterator[None]:
    """Pass `adapter_names` to all adapted layers while the block runs.

    Args:
        tuner: holds the layers.
        model: the adapted model.
        adapter_names: one name for each sample; `__base__` for none.
        num_beams: beams of a beam search, in which the decoder sees each sample once for each beam.
    """
    repeated = [name for name in adapter_names for _ in range(num_beams or 1)]
    get_encoder: Any = getattr(model, "get_encoder", None) if num_beams else None
    encoder = get_encoder() if get_encoder is not None else None
    in_encoder = set(encoder.modules()) if isinstance(encoder, nn.Module) and encoder is not model else set()
    handles = [
        module.register_forward_pre_hook(
            partial(_add_names, names=adapter_names if module in in_encoder else repeated), with_kwargs=True
        )
        for module in tuner.modules()
        if isinstance(module, ASLoRALayer | AuxiliaryTrainingWrapper)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_names(module: nn.Module, args: Any, kwargs: dict[str, Any], names: list[str]) -> Any:
    kwargs["adapter_names"] = names
    return args, kwargs
