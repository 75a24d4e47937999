"""`device-keys`: the keys are on the device too, where it picks; those that the optimizer changes are copied again.

Values are gathered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from ...table.layer_rows import LayerRows
from ...transport.streams import DeviceStreams, StreamEvent
from ..costs import AdapterShape, Flow, Work, gradients_to_host, to_device
from ..device_cache import DeviceCopy
from ..gather import gather
from ..types import Gather, GatheredRows, Selection
from .base import Strategy


class DeviceKeys(Strategy):
    """The keys are on the device too; values are gathered."""

    name = "device-keys"

    def __init__(self, streams: DeviceStreams, layers: Sequence[LayerRows]) -> None:
        super().__init__(streams, layers)
        self._keys = [DeviceCopy(streams, layer.keys, layer) for layer in layers]

    def prefetch_next(self, layer: LayerRows, tokens: int) -> None:
        if layer.number + 1 < len(self.layers):
            self._keys[layer.number + 1].prefetch()

    def select(self, layer: LayerRows, x: Tensor, logits: Tensor) -> Gather:
        return self._select_on_device(layer, x, logits, self._keys[layer.number].current())

    def gather(self, layer: LayerRows, selection: Selection, made: StreamEvent | None = None) -> GatheredRows:
        (values,), arrival = gather(self.streams, layer, [layer.values], selection, made)
        keys = self._keys[layer.number].current().index_select(0, selection.rows)
        return GatheredRows(keys, values, selection.position, arrival, () if made is None else (values,))

    @classmethod
    def tables(cls, shape: AdapterShape) -> int:
        return shape.values // 2 * shape.compute

    @classmethod
    def flows(cls, shape: AdapterShape, work: Work) -> Iterator[Flow]:
        row = shape.d * work.union
        yield to_device("value rows", "forward", row, shape.compute, rows="union")
        if work.rows == "refetch":
            yield to_device("value rows", "backward", row, shape.compute, rows="union")
        yield from gradients_to_host(shape, work, ids=True)
        yield to_device("changed keys", "step", shape.d * work.touched(shape), shape.compute, rows="step")
