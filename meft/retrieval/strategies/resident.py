"""`placement="device"` on a GPU: the tables themselves are on the device, and nothing crosses."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...routing import topk
from ...table.layer_rows import LayerRows
from ...table.shared_rows import Reading
from ...transport.streams import StreamEvent
from ..costs import AdapterShape, Flow, Work
from ..gather import rows_of
from ..types import Gather, GatheredRows, Selection
from .base import Strategy


def capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured on x's device."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class Resident(Strategy):
    """The tables themselves are on the device."""

    name = "resident"
    placement = "device"
    rows_on_device = updates_on_device = True

    def select(self, layer: LayerRows, x: Tensor, logits: Tensor) -> Gather:
        with layer.keys.reading() as keys:
            if not capturing(x):
                return self._select_on_device(layer, x, logits, keys)
            # A graph has fixed sizes and does not wait: all rows stand for the union.
            rows = torch.arange(layer.config.r, device=x.device)
            selection = Selection(rows.to(torch.int32), topk.select_neurons(x, logits, keys, layer.config).ids, rows)
            return lambda: (selection, self._gather_now(layer, selection, None))

    def gather(self, layer: LayerRows, selection: Selection, made: StreamEvent | None = None) -> GatheredRows:
        with Reading((layer.keys, layer.values)) as tables:
            gathered = rows_of(selection.rows, tables)
        return GatheredRows(gathered[0], gathered[1], selection.position)

    @classmethod
    def tables(cls, shape: AdapterShape) -> int:
        separate = shape.compute if shape.compute < shape.master else 0  # else the masters themselves are read
        return shape.values * (shape.master + separate)

    @classmethod
    def flows(cls, shape: AdapterShape, work: Work) -> Iterator[Flow]:
        return iter(())
