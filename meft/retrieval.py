"""Retrieval: picks neurons where their rows live, and brings the rows to where the model computes.

With rows in host memory this is the paper's way: the hidden states go down, the host scores, ids and rows come up.
With rows on the model's device (or a model on the CPU) the same code moves nothing and reads the tables in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .config import MEFTConfig
from .selection import Selection, select_neurons, shared_by_all, union
from .sparse_ffn import Retrieved
from .store import RowTable
from .transfer import Traffic, bring_rows, nbytes


@contextmanager
def retrieved(
    x: Tensor,
    logits: Tensor,
    keys: RowTable,
    values: RowTable,
    config: MEFTConfig,
    traffic: Traffic,
    selection: Selection | None,
) -> Iterator[Retrieved]:
    """Yield picks and rows; tables that are read in place are held still until the block ends.

    Args:
        x: [T, d], float32 or float64.
        logits: W_g x, [T, E].
        selection: picks to use instead of new ones (recomputation), on x's device.
        traffic: counters to increase.
    """
    home = keys.rows.device
    with keys.reading() as key_table:
        if selection is None:
            selection = select_neurons(
                x.to(home),
                logits.to(home),
                key_table,
                experts_per_token=config.probed,
                top_k=config.top_k,
                factor=config.has_factor,
            )
            if config.routing == "union":
                selection = shared_by_all(selection)
            _count_picks(traffic, selection, config, nbytes(x) + nbytes(logits))
        neuron = selection.neuron.to(home)
        rows, order = union(neuron, len(key_table))
        with values.reading(rows) as value_table:
            traffic.forwards += 1
            traffic.tokens += len(x)
            traffic.union_rows += len(rows)
            if config.on_host:
                traffic.bytes_to_device += 2 * len(rows) * nbytes(key_table[:1])
            if home == x.device and key_table.dtype == x.dtype:
                yield Retrieved(selection, key_table, value_table, selection.neuron, rows, order, in_place=True)
                return
            key_rows, value_rows = (bring_rows(table, rows, x) for table in (key_table, value_table))
    place = order.to(x.device)
    yield Retrieved(selection.to(x.device), key_rows, value_rows, place, rows, place, in_place=False)


def _count_picks(traffic: Traffic, selection: Selection, config: MEFTConfig, down: int) -> None:
    each = config.r // config.experts
    load = torch.bincount(selection.neuron // each, minlength=config.experts).cpu()
    traffic.expert_load = load if not len(traffic.expert_load) else traffic.expert_load + load
    if config.on_host:
        traffic.bytes_to_host += down
        traffic.bytes_to_device += selection.nbytes()
