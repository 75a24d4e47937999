"""What a strategy is: how neurons are picked and their rows come to where the FFN is computed, and what that costs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ...routing import topk
from ...table.layer_rows import LayerRows
from ...transport.profiling import phase
from ...transport.staging import Coming, Slot
from ...transport.streams import DeviceStreams, StreamEvent
from ..costs import AdapterShape, Flow, Work
from ..types import Gather, GatheredRows, Selection


class Strategy(ABC):
    """One way to select neurons and gather their rows; all of them pick the same neurons.

    Attributes:
        name: as in `MEFTConfig.retrieval`, where it can be asked for.
        placement: the `MEFTConfig.placement` that it is for; None: rows in host memory and a model on the CPU.
        selects_on_host: whether the host picks, so that hidden states come to it.
        rows_on_device: whether rows are read from tables on the device, so that none are kept or gathered for backward.
        updates_on_device: whether masters and moments are on the device, where nothing has to cross.
        in_place: whether the FFN reads the tables themselves, at once: nothing runs beside the base FFN.

    Args:
        layers: an adapter's layers, in the order in which they run.
    """

    name: ClassVar[str]
    placement: ClassVar[str | None] = "host"
    selects_on_host: ClassVar[bool] = False
    rows_on_device: ClassVar[bool] = False
    updates_on_device: ClassVar[bool] = False
    in_place: ClassVar[bool] = False

    def __init__(self, streams: DeviceStreams, layers: Sequence[LayerRows]) -> None:
        self.streams, self.layers = streams, layers
        self._slots: list[Slot] = []

    # ------------------------------------------------------------------ work

    @staticmethod
    def compute_dtype(layer: LayerRows, given: torch.dtype) -> torch.dtype:
        """What a layer computes in: the rows' dtype if the input is given in it too, else float32 or more.

        On a GPU only products of 16-bit tensors run on tensor cores. Scores and sums are float32 in any case.
        """
        compute_copy = layer.keys.compute_dtype
        if given == compute_copy:
            return compute_copy
        return torch.promote_types(torch.promote_types(given, compute_copy), torch.float32)

    def begin_pass(self) -> None:  # noqa: B027 - most have nothing to copy
        """A pass of many tokens begins: what its first layer needs may be copied ahead."""

    def prefetch_next(self, layer: LayerRows, tokens: int) -> None:  # noqa: B027 - as above
        """All that a layer needs is queued: what the next one needs may be copied ahead."""

    @abstractmethod
    def select(self, layer: LayerRows, x: Tensor, logits: Tensor) -> Gather:
        """Begin with the picks of a layer: queue all that comes before a wait.

        Args:
            x: [T, d]. logits: W_g x, [T, E], float32 or float64; both on the device.

        Returns:
            what waits for the picks and queues the way of their rows.
        """

    @abstractmethod
    def gather(self, layer: LayerRows, selection: Selection, made: StreamEvent | None = None) -> GatheredRows:
        """Queue the way of a selection's rows.

        Args:
            made: the point of the computation from which on a stream finds on the device what the selection is made
                of; None: for a backward pass, `select` was not called before.
        """

    def _select_on_device(self, layer: LayerRows, x: Tensor, logits: Tensor, keys: Tensor) -> Gather:
        """Picks that are made on the device; the host learns the size of the union, and its rows, by a copy."""
        if keys.is_cuda and keys.dtype != x.dtype:
            # The kernel multiplies one dtype; the torch path would launch some products an expert and wait for counts.
            keys = keys.to(x.dtype)
        picks = topk.select_neurons(x, logits, keys, layer.config, layer.traffic.load_on(x.device, layer.config.r))
        rows, count = picks.rows, picks.size
        copied = [count, rows] if layer.config.on_host else [count]
        coming = Coming(self.streams, copied, self._slots)
        if layer.config.on_host:
            layer.traffic.bytes_to_host += sum(t.nbytes for t in copied)

        def finish() -> tuple[Selection, GatheredRows]:
            with layer.traffic.stalled():
                size, *host = coming.wait()
            union = rows[: int(size)]
            host_rows = host[0][: len(union)] if host else union
            selection = Selection(union, picks.position, host_rows.to(torch.int64))
            return selection, self._gather_now(layer, selection, coming.made)

        return finish

    def _gather_now(self, layer: LayerRows, selection: Selection, made: StreamEvent | None) -> GatheredRows:
        with phase("gather rows"):
            return self.gather(layer, selection, made)

    # ------------------------------------------------------------------ costs

    @classmethod
    def tables(cls, shape: AdapterShape) -> int:
        """Bytes of keys and values of all layers on the device."""
        return 0

    @classmethod
    def buffers(cls, shape: AdapterShape) -> int:
        """Bytes of buffers that all layers share on the device, besides those for the rows of a selection."""
        return 0

    @classmethod
    @abstractmethod
    def flows(cls, shape: AdapterShape, work: Work) -> Iterator[Flow]:
        """What crosses for one layer: in each micro-batch, and once per optimizer step."""
