"""A model on the CPU: the FFN reads the tables in host memory where they are, and nothing moves."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from adapter_kernels import SelectedRows

from ...routing import topk
from ...table.layer_rows import LayerRows
from ...table.shared_rows import Reading
from ...transport.streams import StreamEvent
from ..costs import AdapterShape, Flow, Work
from ..types import Gather, GatheredRows, Selection
from .base import Strategy


class InPlace(Strategy):
    """Rows are read where they are; only those of another dtype than the products' are copied."""

    name = "in-place"
    placement = None
    rows_on_device = in_place = True

    @staticmethod
    def compute_dtype(layer: LayerRows, given: torch.dtype) -> torch.dtype:
        """Float32 or more: a CPU gains nothing by 16-bit products."""
        return torch.promote_types(given, torch.float32)

    def select(self, layer: LayerRows, x: Tensor, logits: Tensor) -> Gather:
        load = layer.traffic.load_on(x.device, layer.config.r)
        with Reading((layer.keys, layer.values)) as (keys, values):  # another thread may step them
            picks = topk.select_neurons(x, logits, keys, layer.config, load)
            rows = picks.rows[: int(picks.size)]
            selection = Selection(rows, picks.position, rows.to(torch.int64), picks=picks)
            found = selection, _rows_in(keys, values, selection, picks)
        return lambda: found

    def gather(self, layer: LayerRows, selection: Selection, made: StreamEvent | None = None) -> GatheredRows:
        assert selection.picks is not None
        with Reading((layer.keys, layer.values)) as (keys, values):
            return _rows_in(keys, values, selection, selection.picks)

    @classmethod
    def flows(cls, shape: AdapterShape, work: Work) -> Iterator[Flow]:
        return iter(())


def _rows_in(keys: Tensor, values: Tensor, selection: Selection, picks: SelectedRows) -> GatheredRows:
    dtype = picks.scores.dtype
    if keys.dtype == values.dtype == dtype:
        return GatheredRows(keys, values, picks.ids, scores=picks.scores)
    keys, values = (table.index_select(0, selection.host_rows).to(dtype) for table in (keys, values))
    return GatheredRows(keys, values, selection.position)
