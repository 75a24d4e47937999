"""Retrieval in place: a model on the CPU reads the tables in host memory where they are.

Nothing moves; `meft.retrieval.engine` is for a model on a device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..config import MEFTConfig
from ..routing.topk import Selection, select_neurons, union
from ..table.layer_rows import LayerRows
from ..transport.transfer import Traffic, nbytes
from .sparse_ffn import Retrieved


@contextmanager
def retrieved(x: Tensor, logits: Tensor, layer: LayerRows, selection: Selection | None) -> Iterator[Retrieved]:
    """Yield picks and rows; the tables are held still until the block ends.

    Args:
        x: [T, d], float32 or float64, on the CPU.
        logits: W_g x, [T, E].
        selection: picks to use instead of new ones (recomputation).
    """
    config, traffic = layer.config, layer.traffic
    with layer.keys.reading(in_place=True) as keys:
        if selection is None:
            selection = select_neurons(
                x, logits, keys, experts_per_token=config.probed, top_k=config.top_k, factor=config.router_factor
            )
            _count_picks(traffic, selection, config, nbytes(x) + nbytes(logits))
        rows, order = union(selection.neuron, len(keys))
        with layer.values.reading(rows, in_place=True) as values:
            traffic.forwards += 1
            traffic.tokens += len(x)
            traffic.union_rows += len(rows)
            if config.on_host:
                traffic.bytes_to_device += 2 * len(rows) * nbytes(keys[:1])
            if keys.dtype == x.dtype:
                yield Retrieved(selection, keys, values, selection.neuron, rows, order, in_place=True)
                return
            wide_keys, wide_values = (table.index_select(0, rows).to(x.dtype) for table in (keys, values))
    yield Retrieved(selection, wide_keys, wide_values, order, rows, order, in_place=False)


def _count_picks(traffic: Traffic, selection: Selection, config: MEFTConfig, down: int) -> None:
    expert = torch.div(selection.neuron, config.r // config.experts, rounding_mode="floor")
    load = traffic.load_on(expert.device, config.experts)
    load += torch.bincount(expert, minlength=config.experts)
    if config.on_host:
        traffic.bytes_to_host += down
        traffic.bytes_to_device += selection.nbytes()
