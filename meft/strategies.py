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

from .carry import DeviceCopy, Fetched, KeyBuffers, LayerRows, Picks, gather, picked_neurons, union_of
from .lanes import Lanes
from .transfer import nbytes


def capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured on x's device."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class Strategy(ABC):
    """Picks, and the way of the picked rows.

    Args:
        layers: an adapter's layers, in the order in which they run.
    """

    def __init__(self, lanes: Lanes, layers: Sequence[LayerRows]) -> None:
        self.lanes, self.layers = lanes, layers

    def begin_pass(self) -> None:  # noqa: B027 - most have nothing to bring
        """A pass of many tokens begins: what its first layer needs may be brought."""

    def begun(self, layer: LayerRows, tokens: int) -> None:  # noqa: B027 - as above
        """All that a layer needs is queued: what the next one needs may be brought."""

    @abstractmethod
    def pick(self, layer: LayerRows, x: Tensor, logits: Tensor) -> Picks:
        """The picks of a layer.

        Args:
            x: [T, d]. logits: W_g x, [T, E], float32 or float64; both on the device.
        """

    @abstractmethod
    def fetch(self, layer: LayerRows, picks: Picks, again: bool = False) -> Fetched:
        """Queue the way of a union's rows.

        Args:
            again: for a backward pass; `pick` was not called before.
        """

    def _pick_there(self, layer: LayerRows, x: Tensor, logits: Tensor, keys: Tensor) -> Picks:
        """Picks that are made on the device; the host waits for the size of the union."""
        if keys.is_cuda and keys.dtype != x.dtype:
            # The kernel multiplies one dtype; the torch path would launch some products an expert and wait for counts.
            keys = keys.to(x.dtype)
        ids = picked_neurons(x, logits, keys, layer.config)
        with layer.traffic.stalled():  # for the number of rows, that is for all that is queued on the device
            rows, position = union_of(ids, layer.config)
            home = rows.to(layer.keys.masters.device, torch.int64)
        if layer.config.on_host:
            layer.traffic.bytes_to_host += nbytes(rows)
        return Picks(rows, position, home)


class Host(Strategy):
    """Picks are made in host memory."""

    def __init__(self, lanes: Lanes, layers: Sequence[LayerRows]) -> None:
        super().__init__(lanes, layers)
        self._staged: dict[tuple[str, torch.dtype], Tensor] = {}

    def pick(self, layer: LayerRows, x: Tensor, logits: Tensor) -> Picks:
        down = [self._stage("x", x), self._stage("logits", logits)]
        self.lanes.outbound.after(self.lanes.here())
        self.lanes.outbound.run(partial(_copy_all, down, [x, logits]), [x, logits])
        layer.traffic.bytes_to_host += nbytes(x) + nbytes(logits)
        with layer.traffic.stalled():
            self.lanes.outbound.mark().wait()
        with layer.keys.reading() as wire, layer.traffic.host_work():  # the lock is this thread's, as everywhere
            rows, position = _picked(layer, wire, *down)
        layer.traffic.bytes_to_device += nbytes(rows) + nbytes(position)
        device = self.lanes.device
        return Picks(rows.to(device), position.to(device), rows.to(torch.int64))

    def _stage(self, name: str, like: Tensor) -> Tensor:
        """Host memory for a copy of `like`; there is one of a name, and what was in it is done with by now."""
        key = (name, like.dtype)
        if key not in self._staged or self._staged[key].numel() < like.numel():
            with torch.inference_mode(False):  # it outlives the mode
                self._staged[key] = self.lanes.staging((like.numel(),), like.dtype)
        return self._staged[key][: like.numel()].view(like.shape)

    def fetch(self, layer: LayerRows, picks: Picks, again: bool = False) -> Fetched:
        (keys, values), arrival = gather(self.lanes, layer, [layer.keys, layer.values], picks)
        return Fetched(keys, values, arrival)


@torch.no_grad()
def _picked(layer: LayerRows, wire: Tensor, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    return union_of(picked_neurons(x, logits, wire, layer.config), layer.config)


def _copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=True)


class Stream(Strategy):
    """The keys of one layer after the other come to the device, ahead of their use."""

    def __init__(self, lanes: Lanes, layers: Sequence[LayerRows]) -> None:
        super().__init__(lanes, layers)
        self._keys = KeyBuffers(lanes, layers)
        self._host = Host(lanes, layers)

    def begin_pass(self) -> None:
        self._keys.prefetch(self.layers[0])

    def begun(self, layer: LayerRows, tokens: int) -> None:
        if self._streams(layer, tokens) and layer.number + 1 < len(self.layers):
            self._keys.prefetch(self.layers[layer.number + 1])

    def _streams(self, layer: LayerRows, tokens: int) -> bool:
        """Few tokens, as in decoding, probe fewer neurons than there are: then the host picks."""
        return tokens * layer.config.probed >= layer.config.experts

    def pick(self, layer: LayerRows, x: Tensor, logits: Tensor) -> Picks:
        if not self._streams(layer, len(x)):
            return self._host.pick(layer, x, logits)
        return self._pick_there(layer, x, logits, self._keys.take(layer))

    def fetch(self, layer: LayerRows, picks: Picks, again: bool = False) -> Fetched:
        if again or not self._streams(layer, len(picks.position)):
            return self._host.fetch(layer, picks)
        keys = self._keys.take(layer).index_select(0, picks.rows)
        self._keys.done(layer)
        (values,), arrival = gather(self.lanes, layer, [layer.values], picks)
        return Fetched(keys, values, arrival)


class DeviceKeys(Strategy):
    """The keys are on the device too; values are gathered."""

    def __init__(self, lanes: Lanes, layers: Sequence[LayerRows]) -> None:
        super().__init__(lanes, layers)
        self._keys = [DeviceCopy(lanes, layer.keys, layer.traffic) for layer in layers]

    def begun(self, layer: LayerRows, tokens: int) -> None:
        if layer.number + 1 < len(self.layers):
            self._keys[layer.number + 1].prefetch()

    def pick(self, layer: LayerRows, x: Tensor, logits: Tensor) -> Picks:
        return self._pick_there(layer, x, logits, self._keys[layer.number].current())

    def fetch(self, layer: LayerRows, picks: Picks, again: bool = False) -> Fetched:
        keys = self._keys[layer.number].current().index_select(0, picks.rows)
        (values,), arrival = gather(self.lanes, layer, [layer.values], picks)
        return Fetched(keys, values, arrival)


class DeviceRows(DeviceKeys):
    """Keys and values are on the device too; masters and moments are on the host."""

    def __init__(self, lanes: Lanes, layers: Sequence[LayerRows]) -> None:
        super().__init__(lanes, layers)
        self._values = [DeviceCopy(lanes, layer.values, layer.traffic) for layer in layers]

    def begun(self, layer: LayerRows, tokens: int) -> None:
        super().begun(layer, tokens)
        if layer.number + 1 < len(self.layers):
            self._values[layer.number + 1].prefetch()

    def fetch(self, layer: LayerRows, picks: Picks, again: bool = False) -> Fetched:
        keys, values = self._keys[layer.number].current(), self._values[layer.number].current(picks.host_rows)
        return Fetched(keys.index_select(0, picks.rows), values.index_select(0, picks.rows), None)


class Resident(Strategy):
    """The tables themselves are on the device."""

    def pick(self, layer: LayerRows, x: Tensor, logits: Tensor) -> Picks:
        with layer.keys.reading() as keys:
            if not capturing(x):
                return self._pick_there(layer, x, logits, keys)
            # A graph has fixed sizes and does not wait: all rows stand for the union.
            rows = torch.arange(layer.config.r, device=x.device)
            return Picks(rows.to(torch.int32), picked_neurons(x, logits, keys, layer.config), rows)

    def fetch(self, layer: LayerRows, picks: Picks, again: bool = False) -> Fetched:
        with layer.keys.reading() as keys, layer.values.reading(picks.host_rows) as values:
            return Fetched(keys.index_select(0, picks.rows), values.index_select(0, picks.rows), None)


STRATEGIES: dict[str, type[Strategy]] = {
    "host": Host,
    "stream": Stream,
    "device-keys": DeviceKeys,
    "device-rows": DeviceRows,
    "resident": Resident,
}
