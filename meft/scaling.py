"""The strength of a trained adapter: its values times a factor, all of them or those of the neurons that data uses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .memory.layers import layers_of


@contextmanager
def record_rows(model: nn.Module, adapter_name: str | None = None) -> Iterator[dict[str, Tensor]]:
    """Record which neurons an adapter picks in the forward passes inside of the block.

    Args:
        model: with MEFT, a `PeftModel` or one without.
        adapter_name: None: the active one.

    Yields:
        Path in `model` of each FFN with the adapter -> bool [r] in host memory, filled when the block ends; True: some
        token has picked it. Passes of a CUDA graph are not seen.

    Raises:
        ValueError: there is no such adapter.
    """
    name, layers = layers_of(model, adapter_name)
    before = {path: layer.traffic[name].row_load for path, layer in layers.items()}
    used = {path: torch.zeros(layer.configs[name].r, dtype=torch.bool, device="cpu") for path, layer in layers.items()}
    try:
        yield used
    finally:
        for path, layer in layers.items():
            load = layer.traffic[name].row_load
            if len(load):
                used[path].copy_(load > before[path] if len(before[path]) else load > 0)


@torch.no_grad()
def scale_values(
    model: nn.Module, factor: float, adapter_name: str | None = None, rows: Mapping[str, Tensor] | None = None
) -> None:
    """Multiply an adapter's values by a factor, in place: what the adapter adds at a layer is multiplied by it.

    Keys and router stay, so each layer picks the same neurons for the same input. A factor above 1 goes beyond what was
    trained, one below 0 the other way; 1 changes no bit, and 0 gives the base model's output.

    Args:
        model, adapter_name: as in `record_rows`.
        rows: what `record_rows` of the same model gives: only these neurons, and only these layers. None: all.

    Raises:
        ValueError: there is no such adapter, the factor is no finite number, or `rows` do not fit. Nothing is changed
            then.
    """
    name, layers = layers_of(model, adapter_name)
    if not math.isfinite(factor):
        raise ValueError(f"factor={factor} must be a finite number.")
    tables = {path: layer.tables(name)[1] for path, layer in layers.items()}
    for path, mask in (rows or {}).items():
        if path not in tables:
            raise ValueError(f"rows: '{path}' is no FFN with the adapter '{name}'; use record_rows of this model.")
        if mask.dtype != torch.bool or mask.shape != tables[path].rows.shape[:1]:
            shape = tuple(tables[path].rows.shape[:1])
            raise ValueError(
                f"rows['{path}'] is {mask.dtype} of shape {tuple(mask.shape)}, and a torch.bool of shape {shape} is "
                "needed; use record_rows of this model."
            )
    for path, table in tables.items():
        if rows is None:
            table.rows.mul_(factor)
        elif path in rows:
            chosen = rows[path].to(table.rows.device).nonzero().flatten()
            table.rows[chosen] = table.rows[chosen] * factor
