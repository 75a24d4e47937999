"""A model on the CPU: the FFN reads the tables in host memory where they are, and nothing moves."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...routing import topk
from ...table.layer_rows import LayerRows
from ...transport.streams import StreamEvent
from ..costs import AdapterShape, Flow, Work
from ..types import GatheredRows, PendingSelection, Selection
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

    def select(self, layer: LayerRows, x: Tensor, logits: Tensor) -> PendingSelection:
        picks = topk.select_neurons(x, logits, layer.keys.read_in_place(), layer.config, layer.load_on(x.device))
        rows = picks.rows[: int(picks.size)]
        selection = Selection(rows, picks.position, rows.to(torch.int64), picks=picks)
        return PendingSelection(lambda: selection, None)

    def gather(self, layer: LayerRows, selection: Selection, made: StreamEvent | None = None) -> GatheredRows:
        assert selection.picks is not None
        scores = selection.picks.scores
        tables = keys, values = layer.keys.read_in_place(), layer.values.read_in_place()
        if keys.dtype == values.dtype == scores.dtype:
            return GatheredRows(keys, values, selection.picks.ids, scores=scores)
        keys, values = (table.index_select(0, selection.host_rows).to(scores.dtype) for table in tables)
        return GatheredRows(keys, values, selection.position)

    @classmethod
    def flows(cls, shape: AdapterShape, work: Work) -> Iterator[Flow]:
        return iter(())
