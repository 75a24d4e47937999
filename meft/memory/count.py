"""Counting how often the examples of a corpus use each row of an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from .background import write_counts
from .layers import layers_of


@torch.no_grad()
def count_rows(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], output: str | Path, adapter_name: str | None = None
) -> None:
    """Write how often the tokens of a corpus pick each row, and how many examples pick it, for `train_rows`.

    Each row of a batch is one example, and has a forward pass of its own. The file belongs to the adapter as it is: to
    its layers, r, num_experts and routers.

    Args:
        model: with MEFT, a `PeftModel` or one without; it is in evaluation mode meanwhile.
        batches: arguments of the model, tensors [batch, ...] on its device; `attention_mask` 0 is padding.
        output: the file, which is written whole or not at all.
        adapter_name: None: the active one.

    Raises:
        ValueError: there is no such adapter, or there is no example.
    """
    name, layers = layers_of(model, adapter_name)
    r, experts = layers[next(iter(layers))].configs[name].r, layers[next(iter(layers))].configs[name].experts
    counts = {path: (torch.zeros(r, dtype=torch.int64), torch.zeros(r, dtype=torch.int64)) for path in layers}
    traffic = {path: layer.traffic[name] for path, layer in layers.items()}
    before = {path: replace(one) for path, one in traffic.items()}
    examples = tokens = 0
    training = model.training
    model.eval()
    try:
        for batch in batches:
            for i in range(len(next(iter(batch.values())))):
                for one in traffic.values():
                    one.loads = {}
                inputs = {key: value[i : i + 1] for key, value in batch.items()}
                model(**inputs)
                for path, one in traffic.items():
                    uses, seen = counts[path]
                    load = one.row_load
                    if len(load):
                        uses += load
                        seen += load > 0
                examples += 1
                mask = inputs.get("attention_mask")
                tokens += int(mask.sum()) if mask is not None else next(iter(inputs.values())).shape[1]
    finally:
        model.train(training)
        for path, one in traffic.items():
            for counter in fields(one):
                setattr(one, counter.name, getattr(before[path], counter.name))
    if not examples:
        raise ValueError("count_rows: there is no example: give batches of at least one.")
    routers = {_inner(path): partial(layer.router, name) for path, layer in layers.items()}
    write_counts(
        output,
        {_inner(path): found for path, found in counts.items()},
        routers,
        experts=experts,
        examples=examples,
        tokens=tokens,
    )


def _inner(path: str) -> str:
    """Path of an FFN in the base model, without what a `PeftModel` puts before it."""
    return path.removeprefix("base_model.model.")
