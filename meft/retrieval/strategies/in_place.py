"""A model on the CPU: the FFN reads the tables in host memory where they are, and nothing moves."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...routing import topk
from ...table.layer_rows import LayerRows
from ...transport.streams import StreamEvent
from ..costs import AdapterShape, Flow, Work
from ..gather import union_of
from ..types import GatheredRows, PendingSelection, Selection
from .base import Strategy


class InPlace(Strategy):
    """Rows are read where they are; only those of another dtype than the products' are copied."""

    name = "in-place"
    serves = None
    rows_on_device = in_place = True

    @staticmethod
    def compute_dtype(layer: LayerRows, given: torch.dtype) -> torch.dtype:
        """Float32 or more: a CPU gains nothing by 16-bit products."""
        return torch.promote_types(given, torch.float32)

    def select(self, layer: LayerRows, x: Tensor, logits: Tensor) -> PendingSelection:
        with layer.keys.reading(in_place=True) as keys:
            neurons, dots = topk.select_neurons(x, logits, keys, layer.config)
        rows, count, inverse = union_of(neurons, layer)
        rows = rows[: int(count)]
        selection = Selection(rows, inverse, rows.to(torch.int64), neurons=neurons, dots=dots)
        return PendingSelection(lambda: selection, None)

    def gather(self, layer: LayerRows, selection: Selection, made: StreamEvent | None = None) -> GatheredRows:
        assert selection.neurons is not None
        assert selection.dots is not None
        rows, dtype = selection.host_rows, selection.dots.dtype
        with layer.keys.reading(in_place=True) as keys, layer.values.reading(rows, in_place=True) as values:
            if keys.dtype == values.dtype == dtype:
                return GatheredRows(keys, values, selection.neurons, dots=selection.dots)
            copies = [table.index_select(0, rows).to(dtype) for table in (keys, values)]
        return GatheredRows(copies[0], copies[1], selection.inverse)

    @classmethod
    def flows(cls, shape: AdapterShape, work: Work) -> Iterator[Flow]:
        return iter(())
