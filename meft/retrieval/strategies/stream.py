"""`stream`: the keys of the next layer are copied to the device while this one computes; it picks there.

Only values are gathered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from ...table.layer_rows import LayerRows
from ...transport.streams import DeviceStreams, StreamEvent
from ..costs import AdapterShape, Flow, Work, gradients_to_host, to_device
from ..device_cache import KeyBuffers
from ..gather import gather
from ..types import Gather, GatheredRows, Selection
from .base import Strategy
from .host import Host


class Stream(Strategy):
    """The keys of one layer after the other come to the device, ahead of their use."""

    name = "stream"

    def __init__(self, streams: DeviceStreams, layers: Sequence[LayerRows]) -> None:
        super().__init__(streams, layers)
        self._keys = KeyBuffers(streams, layers)
        self._host = Host(streams, layers)
        config = layers[0].config
        # Fewer tokens, as in decoding, use fewer keys than there are: then the host picks.
        self._least = -(-config.experts // config.probed)

    def begin_pass(self) -> None:
        self._keys.prefetch(self.layers[0])

    def prefetch_next(self, layer: LayerRows, tokens: int) -> None:
        if tokens >= self._least and layer.number + 1 < len(self.layers):
            self._keys.prefetch(self.layers[layer.number + 1])

    def select(self, layer: LayerRows, x: Tensor, logits: Tensor) -> Gather:
        if x.shape[0] < self._least:  # and it gathers their rows
            if layer.tier is not None:
                layer.tier.settle()  # the host picks by keys in its memory
            return self._host.select(layer, x, logits)
        finish = self._select_on_device(layer, x, logits, self._keys.take(layer))
        self._keys.done(layer)  # if the pass goes no further
        return finish

    def gather(self, layer: LayerRows, selection: Selection, made: StreamEvent | None = None) -> GatheredRows:
        if made is None:
            return self._host.gather(layer, selection)
        (values,), arrival = gather(self.streams, layer, [layer.values], selection, made)
        keys = self._keys.take(layer).index_select(0, selection.rows)
        self._keys.done(layer)
        return GatheredRows(keys, values, selection.position, arrival, (values,))

    @classmethod
    def buffers(cls, shape: AdapterShape) -> int:
        return 2 * shape.r * shape.buffered * shape.compute

    @classmethod
    def flows(cls, shape: AdapterShape, work: Work) -> Iterator[Flow]:
        row = shape.d * work.union
        yield to_device("key table", "forward", shape.r * shape.d, shape.compute, ahead=True, rows="table")
        yield to_device("value rows", "forward", row, shape.compute, rows="union")
        if work.rows == "refetch":
            yield to_device("key and value rows", "backward", 2 * row, shape.compute, rows="union")
        yield from gradients_to_host(shape, work, ids=True)
