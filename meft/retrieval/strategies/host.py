"""`host` (the paper's): hidden states go to the host, which picks; ids and rows come back.

arXiv 2406.04984, section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ...routing import topk
from ...table.layer_rows import LayerRows
from ...transport.profiling import phase
from ...transport.staging import Coming, Slot
from ...transport.streams import DeviceStreams, StreamEvent
from ..costs import FP32, ID, AdapterShape, Flow, Work, gradients_to_host, to_device, to_host
from ..gather import gather
from ..types import Gather, GatheredRows, Selection
from .base import Strategy

_ALIGNED = 4  # ids of 4 bytes that end where another tensor may begin: kernels read 16 bytes at a time


class Host(Strategy):
    """Picks are made in host memory."""

    name = "host"
    selects_on_host = True

    def __init__(self, streams: DeviceStreams, layers: Sequence[LayerRows]) -> None:
        super().__init__(streams, layers)
        self._up = Slot(streams)
        self._between = torch.zeros(_ALIGNED, dtype=torch.int32, device="cpu")

    def select(self, layer: LayerRows, x: Tensor, logits: Tensor) -> Gather:
        coming = Coming(self.streams, [x, logits], self._slots)
        layer.traffic.bytes_to_host += x.nbytes + logits.nbytes

        def finish() -> tuple[Selection, GatheredRows]:
            with layer.traffic.stalled():
                hidden = coming.wait()
            # This thread holds the lock of the keys.
            with layer.keys.reading() as keys, layer.traffic.host_work(), phase("pick on the host"):
                rows, position = _selected(layer, keys, *hidden)
            selection = self._sent(layer, rows, position)
            return selection, self._gather_now(layer, selection, coming.made)

        return finish

    def _sent(self, layer: LayerRows, rows: Tensor, position: Tensor) -> Selection:
        """The same picks on the device, in the order of the inbound stream."""
        size = position.numel()
        start = -(-size // _ALIGNED) * _ALIGNED
        (staged,) = self._up.take(((start + rows.shape[0],), torch.int32))
        torch.cat((position.view(-1), self._between[: start - size], rows), out=staged)
        ids = self.streams.inbound.empty(tuple(staged.shape), staged.dtype)
        try:
            self.streams.inbound.run(partial(ids.copy_, staged, non_blocking=True), [ids])
        finally:  # also where it was queued
            arrival = self._up.busy = self.streams.inbound.record_event()
        layer.traffic.bytes_to_device += ids.nbytes
        return Selection(ids[start:], ids[:size].view(position.shape), rows.to(torch.int64), arrival)

    def gather(self, layer: LayerRows, selection: Selection, made: StreamEvent | None = None) -> GatheredRows:
        (keys, values), arrival = gather(self.streams, layer, [layer.keys, layer.values], selection, made)
        return GatheredRows(keys, values, selection.position, arrival, () if made is None else (keys, values))

    @classmethod
    def flows(cls, shape: AdapterShape, work: Work) -> Iterator[Flow]:
        rows = 2 * shape.d * work.union
        yield to_host("hidden states", "forward", work.tokens * shape.d, shape.base)
        yield to_host("router logits", "forward", work.tokens * shape.experts, FP32)
        yield to_device("picks", "forward", 2 * work.tokens * shape.top_k, ID)
        yield to_device("union ids", "forward", work.union, ID)
        yield to_device("key and value rows", "forward", rows, shape.compute, rows="union")
        if work.rows == "refetch":
            yield to_device("key and value rows", "backward", rows, shape.compute, rows="union")
        yield from gradients_to_host(shape, work, ids=False)


def _selected(layer: LayerRows, keys: Tensor, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    picks = topk.select_neurons(x, logits, keys, layer.config, layer.traffic.load_on(x.device, layer.config.r))
    return picks.rows[: int(picks.size)], picks.position
