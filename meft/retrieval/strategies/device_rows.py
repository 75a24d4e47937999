"""`device-rows`: keys and values are on the device too; rows that the optimizer changes are copied again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...table.layer_rows import LayerRows
from ...transport.streams import DeviceStreams, StreamEvent
from ..costs import AdapterShape, Flow, Work, gradients_to_host, to_device
from ..device_cache import DeviceCopy
from ..gather import rows_of
from ..types import GatheredRows, Selection
from .device_keys import DeviceKeys


class DeviceRows(DeviceKeys):
    """Keys and values are on the device too; masters and moments are on the host."""

    name = "device-rows"
    rows_on_device = True

    def __init__(self, streams: DeviceStreams, layers: Sequence[LayerRows]) -> None:
        super().__init__(streams, layers)
        self._values = [DeviceCopy(streams, layer.values, layer) for layer in layers]

    def prefetch_next(self, layer: LayerRows, tokens: int) -> None:
        super().prefetch_next(layer, tokens)
        if layer.number + 1 < len(self.layers):
            self._values[layer.number + 1].prefetch()

    def gather(self, layer: LayerRows, selection: Selection, made: StreamEvent | None = None) -> GatheredRows:
        tables = self._keys[layer.number].current(), self._values[layer.number].current()
        keys, values = rows_of(selection.rows, tables)
        return GatheredRows(keys, values, selection.position)

    @classmethod
    def tables(cls, shape: AdapterShape) -> int:
        return shape.values * shape.compute

    @classmethod
    def flows(cls, shape: AdapterShape, work: Work) -> Iterator[Flow]:
        yield from gradients_to_host(shape, work, ids=True)
        yield to_device("changed rows", "step", 2 * shape.d * work.touched(shape), shape.compute, rows="step")
