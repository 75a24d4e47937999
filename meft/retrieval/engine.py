"""The engine of one adapter: picks neurons, brings their rows beside the base FFN, and sends their gradients back.

Used where the model computes on a device. A model on the CPU whose rows are there too reads them in place
(`meft.retrieval.in_place`), unless the configuration names another way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from ..config import MEFTConfig
from ..cost.auto import ModelProfile, chosen, out_of_memory_errors
from ..gradient.offload_ring import GradientRing
from ..gradient.row_gradient import RowGradient
from ..table.gpu_step import ZeroCopySteps
from ..table.layer_rows import LayerRows
from ..table.row_table import RowTable
from ..table.update_queue import UpdateQueue
from ..transport.openmp_waiting import check_waiting
from ..transport.streams import CudaStreams, DeviceStreams, streams_of
from .gather import experts_of
from .gathered_ffn import GatheredFFN, RowGradientSink
from .refetch import refetched_in_backward
from .second_order import AsRowGradient
from .sparse_ffn import check_versions
from .strategies import STRATEGIES, Strategy, capturing
from .types import GatheredRows, PendingForward, Picks

logger = logging.getLogger(__name__)

_LEAST_SLOT = 256  # rows of a staging buffer, however few the first gradient has: a batch of padding has none


class Engine:
    """Moves the rows of one adapter.

    Attributes:
        on_gradient: called with a table and its gradient that has left for the host; returns what its table gets.

    Args:
        layers: the adapter's layers, in the order in which they run.
        around: the model around the adapter, by which `retrieval="auto"` chooses.
    """

    def __init__(
        self, config: MEFTConfig, layers: list[LayerRows], around: Callable[[], ModelProfile] | None = None
    ) -> None:
        self.config, self.layers, self.around = config, layers, around
        self.on_gradient: Callable[[RowTable, RowGradient], RowGradient] | None = None
        self._given: DeviceStreams | None = None
        self._updates: UpdateQueue | None = None
        self._forget()

    def _forget(self) -> None:
        self._for: tuple[Any, ...] | None = None
        self.streams: DeviceStreams | None = None
        self._plan: tuple[str, str] | None = None
        self._planned_for: tuple[int, int] | None = None  # by `auto`: tokens, and errors for want of memory until then
        self._strategy: Strategy | None = None
        self._rings: dict[tuple[torch.dtype, int], GradientRing] = {}  # by dtype and width
        self._below: Any = None

    def __getstate__(self) -> dict[str, Any]:
        kept = ("config", "layers", "around", "on_gradient")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        on_gradient = state.pop("on_gradient")
        Engine.__init__(self, **state)
        self.on_gradient = on_gradient

    def use(self, streams: DeviceStreams) -> None:
        """Take these streams, whatever the device."""
        self._forget()
        self._given = streams

    def handles(self, device: torch.device) -> bool:
        """Whether inputs on a device take this way."""
        home = self.layers[0].keys.masters.device
        named = self.config.retrieval in ("stream", "device-keys", "device-rows")
        return self._given is not None or device.type == "cuda" or device != home or named

    def updates_beside(self, device: torch.device) -> bool:
        """Whether rows are updated beside the computation of inputs on a device."""
        return self.config.on_host and (device.type != "cpu" or self._given is not None)

    @property
    def widths(self) -> list[int]:
        """The hidden size of each layer."""
        return [layer.width for layer in self.layers]

    @property
    def strategy_name(self) -> str | None:
        """The strategy in use; None before the first pass that needed one, and where rows are read in place."""
        return self._plan[0] if self._plan is not None else None

    @property
    def refused(self) -> tuple[str, ...]:
        """What was asked for and this machine refuses, so far: 'pin_memory' (rows in pageable memory cross more
        slowly), 'zero_copy' (the host steps the rows).
        """
        steps = [getattr(layer.keys.step, "func", None) for layer in self.layers]
        found = {
            "pin_memory": self.config.pin_memory and not all(t.pin for e in self.layers for t in (e.keys, e.values)),
            "zero_copy": any(isinstance(step, ZeroCopySteps) and step.refused for step in steps),
        }
        return tuple(name for name, is_refused in found.items() if is_refused)

    @property
    def refetches(self) -> bool:
        """Whether the rows for the backward pass are brought again."""
        return self._plan is not None and self._plan[1] == "refetch"

    def _planned(self, x: Tensor) -> tuple[str, str]:
        """Strategy, and what happens with the rows for the backward pass."""
        config = self.config
        strategy = config.retrieval if config.on_host else "resident"
        rows = "save" if config.backward_rows == "auto" else config.backward_rows
        if strategy != "auto":
            return strategy, rows
        if not x.is_cuda:
            return "host", rows
        plan = chosen(config, self.widths, x, self.around() if self.around is not None else None)
        self._planned_for = len(x), out_of_memory_errors(x.device)
        return plan.strategy, plan.work.rows

    def _ready(self, layer: LayerRows, x: Tensor) -> Strategy:
        """The strategy for inputs like x; what was made for another device or dtype is made anew."""
        # Of one layer, so that layers of several dtypes do not make it anew in turn.
        now = (x.device, self.layers[0].keys.wire_dtype)
        if self._strategy is None or self._for != now:
            moved = self._for is not None and self._for[0] != x.device
            if moved and layer.number and self.config.on_host:
                assert self._for is not None
                raise RuntimeError(
                    f"MEFT's layers are on {self._for[0]} and {x.device}: rows in host memory are brought to one "
                    "device only; put the model on one GPU (device_map={'': 0}), or set placement='device'."
                )
            self._forget()
            self._for, self.streams = now, self._given or streams_of(x.device)
            self._lock_pages(self.streams)
            self._plan = self._planned(x)
            with torch.inference_mode(False):  # its buffers outlive the mode
                strategy = STRATEGIES[self._plan[0]](self.streams, self.layers)
            beside = self.updates_beside(x.device)
            if beside and self._updates is None:
                self._updates = UpdateQueue()
                check_waiting(updates_beside=True)
            for each in self.layers if beside else ():
                each.keys.updates = each.values.updates = self._updates
                each.keys.name, each.values.name = (f"{part} of layer {each.number}" for part in ("keys", "values"))
            if beside and self.config.zero_copy:
                self._step_by_device(self.streams)
            self._strategy = strategy  # last: what fails for want of memory is made anew with a smaller batch
        return self._strategy

    def _lock_pages(self, streams: DeviceStreams) -> None:
        device = streams.device if isinstance(streams, CudaStreams) and self.config.on_host else None
        for layer in self.layers:
            layer.keys.locked_for = layer.values.locked_for = device

    def _step_by_device(self, streams: DeviceStreams) -> None:
        with torch.inference_mode(False):  # as above
            steps = {width: ZeroCopySteps(streams, width) for width in self.widths}
        for layer in self.layers:
            layer.keys.step = layer.values.step = partial(steps[layer.width], layer.traffic)

    # ------------------------------------------------------------------ forward

    def begin_pass(self) -> None:
        """A pass with a gradient begins."""
        self._below = None
        for ring in self._rings.values():
            ring.begin_pass()
        if self._strategy is not None:
            self._strategy.begin_pass()

    def compute_dtype(self, layer: LayerRows, given: torch.dtype) -> torch.dtype:
        """What a layer computes in: the rows' dtype if the input is given in it too, else float32 or more.

        On a GPU only products of 16-bit tensors run on tensor cores. Scores and sums are float32 in any case.
        """
        wire = layer.keys.wire_dtype
        if given == wire:
            return wire
        return torch.promote_types(torch.promote_types(given, wire), torch.float32)

    def begin(
        self, layer: LayerRows, x: Tensor, logits: Tensor, picks: Picks | None, kept: GatheredRows | None
    ) -> PendingForward:
        """Begin to pick a layer's neurons; the host waits for nothing on the device. Known picks: queue their rows.

        Args:
            x: [T, d] in `compute_dtype`, without a graph. logits: W_g x, [T, E], without a graph.
            picks: picks to use instead of new ones (recomputation). kept: their rows, if they were kept.
        """
        if capturing(x) and (self.config.on_host or torch.is_grad_enabled()):
            raise RuntimeError(
                "MEFT cannot be captured into this CUDA graph: how many rows a pass uses is known only when it runs. "
                "Do without CUDA graphs (torch.compile: mode='default'), or set placement='device' and capture a pass "
                "under torch.no_grad()."
            )
        if picks is None and not layer.number and self._planned_for is not None:
            tokens, errors = self._planned_for
            # What fits beside fewer tokens (an evaluation, a short batch) may not fit beside these; nor what did before
            # an optimizer, another adapter or another process took memory, if it has run out since.
            if len(x) > tokens or out_of_memory_errors(x.device) > errors:
                self._forget()
        strategy = self._ready(layer, x)
        with layer.traffic.stalled():  # for the updates of these rows
            versions = layer.versions
        if picks is not None:
            if kept is None:
                with record_function("meft: fetch rows"):
                    kept = strategy.fetch(layer, picks)
            self._count(layer, x, picks)
            return PendingForward(layer, picks, kept, versions, True)
        with record_function("meft: pick"):
            picking = strategy.pick(layer, x, logits)

        def complete() -> tuple[Picks, GatheredRows]:
            picks = picking.wait()
            with record_function("meft: fetch rows"):
                fetched = strategy.fetch(layer, picks, picking.made)
            self._count(layer, x, picks)
            return picks, fetched

        return PendingForward(layer, None, None, versions, False, complete)

    @staticmethod
    def _count(layer: LayerRows, x: Tensor, picks: Picks) -> None:
        traffic = layer.traffic
        traffic.forwards += 1
        traffic.tokens += len(x)
        traffic.union_rows += len(picks.rows)

    def complete(self, begun: PendingForward) -> GatheredRows:
        """Wait for the picks, now that the base FFN is queued, and queue the way of their rows."""
        if begun.complete is not None:
            complete, begun.complete = begun.complete, None
            begun.picks, begun.fetched = complete()
        assert begun.fetched is not None
        return begun.fetched

    def finish(
        self, begun: PendingForward, x: Tensor, logits: Tensor, refetch: bool, done: Callable[[], None]
    ) -> Tensor:
        """The adapter's output, [T, d].

        Args:
            x, logits: as in `begin`, with their graphs.
            refetch: rows are not kept for the backward pass, which brings them again.
            done: called when the gradients of the rows have been made.
        """
        assert self.streams is not None
        layer, fetched, picks = begun.layer, self.complete(begun), begun.picks
        assert picks is not None
        begun.fetched = None  # the graph holds `begun`
        if not begun.again and self._strategy is not None:
            # Now that the base FFN is queued: the next layer's rows may have to wait for their update.
            self._strategy.begun(layer, len(x))
        picks.join(self.streams)
        fetched.join(self.streams)
        near = (fetched.keys.detach().to(x.dtype), fetched.values.detach().to(x.dtype))
        idle = None if self.config.router_factor else logits  # its router gets a gradient of zero, as in place
        # Sums over tokens pass the range of float16 where their terms do not.
        wide = self.config.gradient_dtype == "float32" or x.dtype == torch.float16
        dtype = torch.promote_types(x.dtype, torch.float32) if wide else x.dtype
        rows = RowGradientSink.apply(layer.keys.rows, layer.values.rows, near[0], dtype, idle, self, begun, done)
        factors = None
        if self.config.router_factor:
            factors = logits.gather(1, experts_of(picks, self.config.r // self.config.experts))
        absent = refetched_in_backward(self, begun, near, refetch, self._below)
        with absent as self._below, record_function("meft: sparse FFN"):
            return GatheredFFN.apply(x, *rows, factors, *near, picks.position)

    def fetch_again(self, begun: PendingForward) -> GatheredRows:
        """Queue the way of a layer's rows for its backward pass.

        Raises:
            RuntimeError: the rows were updated since the forward pass, or a later pass has failed as it began.
        """
        strategy = self._in_use()
        check_versions(begun.versions, begun.layer.versions)
        with record_function("meft: fetch rows again"):
            return strategy.fetch(begun.layer, _known(begun))

    def fetch_below(self, layer: LayerRows, picks: Picks) -> GatheredRows:
        """Queue the way of the rows of the layer below for its recomputation."""
        strategy = self._in_use()
        with record_function("meft: fetch rows again"):
            return strategy.fetch(self.layers[layer.number - 1], picks)

    def _in_use(self) -> Strategy:
        if self._strategy is None:
            raise RuntimeError(
                "MEFT's engine has no buffers for this backward pass, because a later forward pass failed as it began "
                "(perhaps for want of memory): run the forward pass again, with fewer tokens."
            )
        return self._strategy

    # ------------------------------------------------------------------ backward

    def keep_graph(self, begun: PendingForward, which: int, gradient: Tensor) -> RowGradient:
        """As `send_back`, with a graph, and at once."""
        table = (begun.layer.keys, begun.layer.values)[which].rows
        return AsRowGradient.apply(gradient, _known(begun).host_rows, table)

    def send_back(self, begun: PendingForward, which: int, gradient: Tensor) -> RowGradient:
        """A gradient of the rows of keys (0) or values (1), [u, d], leaves for its table."""
        layer, rows = begun.layer, _known(begun).host_rows
        owner = (layer.keys, layer.values)[which]
        table = owner.rows
        if not self.config.on_host:
            return RowGradient(rows, gradient.to(torch.promote_types(table.dtype, torch.float32)), table)
        dtype = gradient.dtype if self.config.gradient_dtype == "auto" else torch.float32  # float64 is narrowed
        form = dtype, gradient.shape[1]
        if form not in self._rings:
            assert self.streams is not None
            capacity = min(self.config.r, max(_LEAST_SLOT, 2 * len(gradient)))
            self._rings[form] = GradientRing(self.streams, capacity, gradient.shape[1], dtype)
        with record_function("meft: row gradients"):
            leaving = self._rings[form].send(rows, gradient, table, layer.traffic)
        return self.on_gradient(owner, leaving) if self.on_gradient is not None else leaving


def _known(begun: PendingForward) -> Picks:
    assert begun.picks is not None
    return begun.picks
