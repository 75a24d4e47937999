"""The ways in which neurons are picked and their rows come to the device; all pick the same neurons.

`host` (the paper's): hidden states go down, the host scores, ids and rows come up. `stream`: the keys of the next
layer are copied to the device while this one computes; picks are made there, and only values are gathered.
`device-keys`: the keys stay on the device, and rows that the optimizer has changed are copied again. `device-rows`: so
do the values. `resident`: the tables themselves are on the device. (arXiv 2406.04984, section 3.2, is `host`.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..routing.topk import picked_neurons
from ..table.layer_rows import LayerRows
from ..transport.staging import Coming, Slot
from ..transport.streams import DeviceStreams, StreamEvent
from ..transport.transfer import nbytes
from .device_cache import DeviceCopy, KeyBuffers
from .gather import gather, rows_of, union_of
from .types import GatheredRows, Picking, Picks

_ALIGNED = 4  # ids of 4 bytes that end where another tensor may begin: kernels read 16 bytes at a time


def capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured on x's device."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class Strategy(ABC):
    """Picks, and the way of the picked rows.

    Args:
        layers: an adapter's layers, in the order in which they run.
    """

    def __init__(self, streams: DeviceStreams, layers: Sequence[LayerRows]) -> None:
        self.streams, self.layers = streams, layers
        self._slots: list[Slot] = []

    def begin_pass(self) -> None:  # noqa: B027 - most have nothing to bring
        """A pass of many tokens begins: what its first layer needs may be brought."""

    def begun(self, layer: LayerRows, tokens: int) -> None:  # noqa: B027 - as above
        """All that a layer needs is queued: what the next one needs may be brought."""

    @abstractmethod
    def pick(self, layer: LayerRows, x: Tensor, logits: Tensor) -> Picking:
        """Begin with the picks of a layer: queue all that comes before a wait.

        Args:
            x: [T, d]. logits: W_g x, [T, E], float32 or float64; both on the device.
        """

    @abstractmethod
    def fetch(self, layer: LayerRows, picks: Picks, made: StreamEvent | None = None) -> GatheredRows:
        """Queue the way of a union's rows.

        Args:
            made: of the picking; None: for a backward pass, `pick` was not called before.
        """

    def _pick_there(self, layer: LayerRows, x: Tensor, logits: Tensor, keys: Tensor) -> Picking:
        """Picks that are made on the device; the host learns the size of the union, and its rows, by a copy."""
        if keys.is_cuda and keys.dtype != x.dtype:
            # The kernel multiplies one dtype; the torch path would launch some products an expert and wait for counts.
            keys = keys.to(x.dtype)
        ids = picked_neurons(x, logits, keys, layer.config)
        rows, count, position = union_of(ids, layer)
        told = [count, rows] if layer.config.on_host else [count]
        coming = Coming(self.streams, told, self._slots)
        if layer.config.on_host:
            layer.traffic.bytes_to_host += sum(map(nbytes, told))

        def wait() -> Picks:
            with layer.traffic.stalled():
                size, *there = coming.wait()
            union = rows[: int(size)]
            home = there[0][: len(union)] if there else union
            return Picks(union, position, home.to(torch.int64))

        return Picking(wait, coming.made)


class Host(Strategy):
    """Picks are made in host memory."""

    def __init__(self, streams: DeviceStreams, layers: Sequence[LayerRows]) -> None:
        super().__init__(streams, layers)
        self._up = Slot(streams)

    def pick(self, layer: LayerRows, x: Tensor, logits: Tensor) -> Picking:
        coming = Coming(self.streams, [x, logits], self._slots)
        layer.traffic.bytes_to_host += nbytes(x) + nbytes(logits)

        def wait() -> Picks:
            with layer.traffic.stalled():
                down = coming.wait()
            with layer.keys.reading() as wire, layer.traffic.host_work():  # the lock is this thread's, as everywhere
                rows, position = _picked(layer, wire, *down)
            return self._sent(layer, rows, position)

        return Picking(wait, coming.made)

    def _sent(self, layer: LayerRows, rows: Tensor, position: Tensor) -> Picks:
        """The same picks on the device, in the order of the inbound stream."""
        start = -(-position.numel() // _ALIGNED) * _ALIGNED
        (here,) = self._up.take(((start + len(rows),), torch.int32))
        here[: position.numel()].view(position.shape).copy_(position)
        here[start:].copy_(rows)
        with torch.inference_mode(False):  # as in `gather`
            there = self.streams.inbound.empty(tuple(here.shape), here.dtype)
        try:
            self.streams.inbound.run(partial(there.copy_, here, non_blocking=True), [there])
        finally:  # also where it was queued
            arrival = self._up.busy = self.streams.inbound.record_event()
        layer.traffic.bytes_to_device += nbytes(there)
        places = there[: position.numel()].view(position.shape)
        return Picks(there[start:], places, rows.to(torch.int64), arrival)

    def fetch(self, layer: LayerRows, picks: Picks, made: StreamEvent | None = None) -> GatheredRows:
        (keys, values), arrival = gather(self.streams, layer, [layer.keys, layer.values], picks, made)
        return GatheredRows(keys, values, arrival, () if made is None else (keys, values))


@torch.no_grad()
def _picked(layer: LayerRows, wire: Tensor, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    rows, count, position = union_of(picked_neurons(x, logits, wire, layer.config), layer)
    return rows[: int(count)], position


class Stream(Strategy):
    """The keys of one layer after the other come to the device, ahead of their use."""

    def __init__(self, streams: DeviceStreams, layers: Sequence[LayerRows]) -> None:
        super().__init__(streams, layers)
        self._keys = KeyBuffers(streams, layers)
        self._host = Host(streams, layers)

    def begin_pass(self) -> None:
        self._keys.prefetch(self.layers[0])

    def begun(self, layer: LayerRows, tokens: int) -> None:
        if self._streams(layer, tokens) and layer.number + 1 < len(self.layers):
            self._keys.prefetch(self.layers[layer.number + 1])

    def _streams(self, layer: LayerRows, tokens: int) -> bool:
        """Few tokens, as in decoding, probe fewer neurons than there are: then the host picks."""
        return tokens * layer.config.probed >= layer.config.experts

    def pick(self, layer: LayerRows, x: Tensor, logits: Tensor) -> Picking:
        if not self._streams(layer, len(x)):
            return self._host.pick(layer, x, logits)
        picking = self._pick_there(layer, x, logits, self._keys.take(layer))
        self._keys.done(layer)  # if the pass goes no further
        return picking

    def fetch(self, layer: LayerRows, picks: Picks, made: StreamEvent | None = None) -> GatheredRows:
        if made is None or not self._streams(layer, len(picks.position)):
            return self._host.fetch(layer, picks, made)
        (values,), arrival = gather(self.streams, layer, [layer.values], picks, made)
        keys = self._keys.take(layer).index_select(0, picks.rows)
        self._keys.done(layer)
        return GatheredRows(keys, values, arrival, (values,))


class DeviceKeys(Strategy):
    """The keys are on the device too; values are gathered."""

    def __init__(self, streams: DeviceStreams, layers: Sequence[LayerRows]) -> None:
        super().__init__(streams, layers)
        self._keys = [DeviceCopy(streams, layer.keys, layer.traffic) for layer in layers]

    def begun(self, layer: LayerRows, tokens: int) -> None:
        if layer.number + 1 < len(self.layers):
            self._keys[layer.number + 1].prefetch()

    def pick(self, layer: LayerRows, x: Tensor, logits: Tensor) -> Picking:
        return self._pick_there(layer, x, logits, self._keys[layer.number].current())

    def fetch(self, layer: LayerRows, picks: Picks, made: StreamEvent | None = None) -> GatheredRows:
        (values,), arrival = gather(self.streams, layer, [layer.values], picks, made)
        keys = self._keys[layer.number].current().index_select(0, picks.rows)
        return GatheredRows(keys, values, arrival, () if made is None else (values,))


class DeviceRows(DeviceKeys):
    """Keys and values are on the device too; masters and moments are on the host."""

    def __init__(self, streams: DeviceStreams, layers: Sequence[LayerRows]) -> None:
        super().__init__(streams, layers)
        self._values = [DeviceCopy(streams, layer.values, layer.traffic) for layer in layers]

    def begun(self, layer: LayerRows, tokens: int) -> None:
        super().begun(layer, tokens)
        if layer.number + 1 < len(self.layers):
            self._values[layer.number + 1].prefetch()

    def fetch(self, layer: LayerRows, picks: Picks, made: StreamEvent | None = None) -> GatheredRows:
        tables = self._keys[layer.number].current(), self._values[layer.number].current(picks.host_rows)
        keys, values = rows_of(picks.rows, tables)
        return GatheredRows(keys, values, None)


class Resident(Strategy):
    """The tables themselves are on the device."""

    def pick(self, layer: LayerRows, x: Tensor, logits: Tensor) -> Picking:
        with layer.keys.reading() as keys:
            if not capturing(x):
                return self._pick_there(layer, x, logits, keys)
            # A graph has fixed sizes and does not wait: all rows stand for the union.
            rows = torch.arange(layer.config.r, device=x.device)
            picks = Picks(rows.to(torch.int32), picked_neurons(x, logits, keys, layer.config), rows)
            return Picking(lambda: picks, None)

    def fetch(self, layer: LayerRows, picks: Picks, made: StreamEvent | None = None) -> GatheredRows:
        with layer.keys.reading() as keys, layer.values.reading(picks.host_rows) as values:
            near = rows_of(picks.rows, [keys, values])
        return GatheredRows(near[0], near[1], None)


STRATEGIES: dict[str, type[Strategy]] = {
    "host": Host,
    "stream": Stream,
    "device-keys": DeviceKeys,
    "device-rows": DeviceRows,
    "resident": Resident,
}
