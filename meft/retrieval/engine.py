"""The engine of one adapter: selects neurons, gathers their rows beside the base FFN, and sends their gradients back.

How it does so is up to its strategy (`meft.retrieval.strategies`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..config import MEFTConfig
from ..gradient.offload_ring import GradientRing
from ..gradient.row_gradient import RowGradient
from ..table.gpu_step import ZeroCopySteps
from ..table.layer_rows import LayerRows
from ..table.row_table import RowTable
from ..table.update_queue import UpdateQueue
from ..transport.openmp_waiting import check_waiting
from ..transport.profiling import phase
from ..transport.streams import CudaStreams, DeviceStreams, HostStreams, streams_of
from .costs import Rows
from .gather import experts_of
from .refetch import RefetchedRows, refetched_in_backward
from .second_order import AsRowGradient
from .sparse_ffn import SparseFFN, output_of
from .strategies import STRATEGIES, InPlace, Strategy, capturing, strategy_name
from .types import GatheredRows, PendingForward, Selection, check_versions

logger = logging.getLogger(__name__)

_LEAST_SLOT = 256  # rows of a staging buffer, however few the first gradient has: a batch of padding has none

# For layers of these widths and inputs like x [T, d] on a CUDA device: the strategy, and what happens with the rows
# for the backward pass.
Chooser = Callable[[MEFTConfig, list[int], Tensor], tuple[str, Rows]]


class Engine:
    """Moves the rows of one adapter.

    Attributes:
        on_gradient: called with a table and its gradient that has left for the host; returns what its table gets.

    Args:
        layers: the adapter's layers, in the order in which they run.
        choose: what `retrieval="auto"` asks on a CUDA device.
    """

    def __init__(self, config: MEFTConfig, layers: list[LayerRows], choose: Chooser | None = None) -> None:
        self.config, self.layers, self.choose = config, layers, choose
        self.on_gradient: Callable[[RowTable, RowGradient], RowGradient] | None = None
        self._given: DeviceStreams | None = None
        self._updates: UpdateQueue | None = None
        self._in_place = InPlace(HostStreams(torch.device("cpu")), layers)
        self._forget()

    def _forget(self) -> None:
        self._for: tuple[Any, ...] | None = None
        self.streams: DeviceStreams | None = None
        self._plan: tuple[str, Rows] | None = None
        self._planned_for: tuple[int, int] | None = None  # by `auto`: tokens, and errors for want of memory until then
        self._strategy: Strategy | None = None
        self._reads_in_place: dict[torch.device, bool] = {}
        self._rings: dict[tuple[torch.dtype, int], GradientRing] = {}  # by dtype and width
        self._below: Any = None

    def __getstate__(self) -> dict[str, Any]:
        kept = ("config", "layers", "choose", "on_gradient")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        on_gradient = state.pop("on_gradient")
        Engine.__init__(self, **state)
        self.on_gradient = on_gradient

    def use(self, streams: DeviceStreams) -> None:
        """Take these streams, whatever the device."""
        self._forget()
        self._given = streams

    def reads_in_place(self, device: torch.device) -> bool:
        """Whether rows are read where they are, for inputs on a device."""
        known = self._reads_in_place.get(device)
        if known is None:
            name = strategy_name(self.config, device, apart=self._given is not None)
            known = self._reads_in_place[device] = name is not None and STRATEGIES[name].in_place
        return known

    def updates_beside(self, device: torch.device) -> bool:
        """Whether rows are updated beside the computation of inputs on a device."""
        return self.config.on_host and (device.type != "cpu" or self._given is not None)

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

    def refetches(self, device: torch.device) -> bool:
        """Whether the rows for the backward pass are gathered again, for inputs on a device."""
        return self._plan is not None and self._plan[1] == "refetch" and not self.reads_in_place(device)

    # ------------------------------------------------------------------ the strategy

    def _planned(self, x: Tensor) -> tuple[str, Rows]:
        """Strategy, and what happens with the rows for the backward pass."""
        asked = self.config.backward_rows
        name = strategy_name(self.config, x.device, apart=self._given is not None)
        if name is None:
            if self.choose is not None:
                self._planned_for = len(x), out_of_memory_errors(x.device)
                return self.choose(self.config, [layer.width for layer in self.layers], x)
            name = strategy_name(self.config, torch.device("cpu"), apart=True)
            assert name is not None
        return name, "refetch" if asked == "refetch" else "save"

    def _prepare(self, layer: LayerRows, x: Tensor) -> Strategy:
        """The strategy for inputs like x; what was made for another device or dtype is made anew."""
        # Of one layer, so that layers of several dtypes do not make it anew in turn.
        inputs = (x.device, self.layers[0].keys.compute_dtype)
        if self._strategy is None or self._for != inputs:
            moved = self._for is not None and self._for[0] != x.device
            if moved and layer.number and self.config.on_host:
                assert self._for is not None
                raise RuntimeError(
                    f"MEFT's layers are on {self._for[0]} and {x.device}: rows in host memory are copied to one "
                    "device only; put the model on one GPU (device_map={'': 0}), or set placement='device'."
                )
            self._forget()
            self._for, self.streams = inputs, self._given or streams_of(x.device)
            self._lock_pages(self.streams)
            self._plan = self._planned(x)
            with torch.inference_mode(False):  # its buffers outlive the mode
                strategy = STRATEGIES[self._plan[0]](self.streams, self.layers)
            if self.updates_beside(x.device):
                self._update_beside(self.streams)
            self._strategy = strategy  # last: what fails for want of memory is made anew with a smaller batch
        return self._strategy

    def _update_beside(self, streams: DeviceStreams) -> None:
        if self._updates is None:
            self._updates = UpdateQueue()
            check_waiting(updates_beside=True)
        for layer in self.layers:
            layer.keys.updates = layer.values.updates = self._updates
            layer.keys.name, layer.values.name = (f"{part} of layer {layer.number}" for part in ("keys", "values"))
        if self.config.zero_copy:
            with torch.inference_mode(False):  # as above
                steps = {width: ZeroCopySteps(streams, width) for width in {layer.width for layer in self.layers}}
            for layer in self.layers:
                layer.keys.step = layer.values.step = partial(steps[layer.width], layer.traffic)

    def _lock_pages(self, streams: DeviceStreams) -> None:
        device = streams.device if isinstance(streams, CudaStreams) and self.config.on_host else None
        for layer in self.layers:
            layer.keys.locked_for = layer.values.locked_for = device

    def _in_use(self) -> Strategy:
        if self._strategy is None:
            raise RuntimeError(
                "MEFT's engine has no buffers for this backward pass, because a later forward pass failed as it began "
                "(perhaps for want of memory): run the forward pass again, with fewer tokens."
            )
        return self._strategy

    # ------------------------------------------------------------------ forward

    def begin_pass(self) -> None:
        """A pass with a gradient begins."""
        self._below = None
        for ring in self._rings.values():
            ring.begin_pass()
        if self._strategy is not None:
            self._strategy.begin_pass()

    def compute_dtype(self, layer: LayerRows, x: Tensor) -> torch.dtype:
        """What a layer computes in, for inputs like x."""
        strategy = self._in_place if self.reads_in_place(x.device) else Strategy
        return strategy.compute_dtype(layer, x.dtype)

    def select(
        self, layer: LayerRows, x: Tensor, logits: Tensor, selection: Selection | None, rows: GatheredRows | None
    ) -> PendingForward:
        """Begin to select a layer's neurons; the host waits for nothing on the device. Known ones: gather their rows.

        Args:
            x: [T, d] in `compute_dtype`, without a graph. logits: W_g x, [T, E], without a graph.
            selection: to be used instead of a new one (recomputation). rows: its rows, if they were kept.
        """
        if self.reads_in_place(x.device):
            strategy: Strategy = self._in_place
        else:
            self._check_graphs(x)
            if selection is None and not layer.number and self._planned_for is not None:
                tokens, errors = self._planned_for
                # What fits beside fewer tokens (an evaluation, a short batch) may not fit beside these; nor what did
                # before an optimizer, another adapter or another process took memory, if it has run out since.
                if len(x) > tokens or out_of_memory_errors(x.device) > errors:
                    self._forget()
            strategy = self._prepare(layer, x)
        # Without a graph nobody asks later whether rows are still those; a wait for queued updates is counted here.
        asked = torch.is_grad_enabled() or not strategy.in_place
        versions = layer.versions_after_updates() if asked else None
        if selection is not None:
            if rows is None:
                with phase("gather rows"):
                    rows = strategy.gather(layer, selection)
            layer.count(len(x), len(selection.rows))
            return PendingForward(layer, selection, rows, versions, True, strategy.in_place)
        if strategy.in_place:  # nothing runs beside the base FFN
            found = strategy.select(layer, x, logits).wait()
            layer.count(len(x), len(found.rows))
            return PendingForward(layer, found, strategy.gather(layer, found), versions, False, True)
        with phase("select"):
            selecting = strategy.select(layer, x, logits)

        def gather() -> tuple[Selection, GatheredRows]:
            selection = selecting.wait()
            with phase("gather rows"):
                rows = strategy.gather(layer, selection, selecting.made)
            layer.count(len(x), len(selection.rows))
            return selection, rows

        return PendingForward(layer, None, None, versions, False, False, gather)

    def _check_graphs(self, x: Tensor) -> None:
        if capturing(x) and (self.config.on_host or torch.is_grad_enabled()):
            raise RuntimeError(
                "MEFT cannot be captured into this CUDA graph: how many rows a pass uses is known only when it runs. "
                "Do without CUDA graphs (torch.compile: mode='default'), or set placement='device' and capture a pass "
                "under torch.no_grad()."
            )

    @staticmethod
    def gather(pending: PendingForward) -> GatheredRows:
        """Wait for the selection, now that the base FFN is queued, and queue the way of its rows."""
        if pending.gather is not None:
            gather, pending.gather = pending.gather, None
            pending.selection, pending.rows = gather()
        assert pending.rows is not None
        return pending.rows

    def sparse_ffn(
        self, pending: PendingForward, x: Tensor, logits: Tensor, refetch: bool, done: Callable[[], None]
    ) -> Tensor:
        """The adapter's output, [T, d].

        Args:
            x, logits: as in `select`, with their graphs.
            refetch: rows are not kept for the backward pass, which gathers them again.
            done: called when the gradients of the rows have been made.
        """
        layer, rows, selection = pending.layer, self.gather(pending), pending.known
        pending.rows = None  # the graph holds `pending`
        if not rows.in_place:
            rows = self._arrived(pending, rows, x)
        if pending.on_host and not torch.is_grad_enabled() and rows.in_place:
            return output_of(x, None, rows)
        factors = idle = None
        if self.config.router_factor:
            factors = logits.gather(1, experts_of(selection, layer.neurons_per_expert))
        else:
            idle = logits  # its router gets a gradient of zero
        # Sums over tokens pass the range of float16 where their terms do not.
        wide = self.config.gradient_dtype == "float32" or x.dtype == torch.float16
        dtype = torch.promote_types(x.dtype, torch.float32) if wide else x.dtype
        absent: AbstractContextManager[RefetchedRows | None] = nullcontext()
        if refetch:
            absent = refetched_in_backward(self, pending, (rows.keys, rows.values), self._below)
        with absent as self._below, phase("sparse FFN"):
            if not torch.is_grad_enabled():
                return output_of(x, factors, rows)
            return SparseFFN.apply(
                x, factors, idle, layer.keys.rows, layer.values.rows, rows, pending, self, dtype, done
            )

    def _arrived(self, pending: PendingForward, rows: GatheredRows, x: Tensor) -> GatheredRows:
        """Rows as the computation reads them from now on, in x's dtype."""
        if self.streams is not None and not pending.on_host:  # other layers may be on a device
            if not pending.recomputed and self._strategy is not None:
                # Now that the base FFN is queued: the next layer's rows may have to wait for their update.
                self._strategy.prefetch_next(pending.layer, len(x))
            pending.known.wait_in(self.streams)
            rows.wait_in(self.streams)
        return GatheredRows(rows.keys.detach().to(x.dtype), rows.values.detach().to(x.dtype), rows.position)

    def gather_again(self, pending: PendingForward) -> GatheredRows:
        """Queue the way of a layer's rows for its backward pass.

        Raises:
            RuntimeError: the rows were updated since the forward pass, or a later pass has failed as it began.
        """
        strategy = self._in_use()
        check_versions(pending.versions, pending.layer.versions)
        with phase("gather rows again"):
            return strategy.gather(pending.layer, pending.known)

    def gather_below(self, layer: LayerRows, selection: Selection) -> GatheredRows:
        """Queue the way of the rows of the layer below for its recomputation."""
        strategy = self._in_use()
        with phase("gather rows again"):
            return strategy.gather(self.layers[layer.number - 1], selection)

    # ------------------------------------------------------------------ backward

    def keep_graph(self, pending: PendingForward, which: int, gradient: Tensor) -> RowGradient:
        """As `send_back`, with a graph, and at once."""
        table = (pending.layer.keys, pending.layer.values)[which].rows
        return AsRowGradient.apply(gradient, pending.known.host_rows, table)

    def send_back(self, pending: PendingForward, which: int, gradient: Tensor) -> RowGradient:
        """A gradient of the rows of keys (0) or values (1), [u, d], leaves for its table."""
        layer, rows = pending.layer, pending.known.host_rows
        owner = (layer.keys, layer.values)[which]
        table = owner.rows
        if not self.config.on_host or self.reads_in_place(gradient.device):
            wide = torch.promote_types(gradient.dtype, torch.promote_types(table.dtype, torch.float32))
            return RowGradient(rows, gradient.to(table.device, wide), table)
        dtype = gradient.dtype if self.config.gradient_dtype == "auto" else torch.float32  # float64 is narrowed
        form = dtype, gradient.shape[1]
        if form not in self._rings:
            assert self.streams is not None
            capacity = min(self.config.r, max(_LEAST_SLOT, 2 * len(gradient)))
            self._rings[form] = GradientRing(self.streams, capacity, gradient.shape[1], dtype)
        with phase("row gradients"):
            leaving = self._rings[form].send(rows, gradient, table, layer.traffic)
        return self.on_gradient(owner, leaving) if self.on_gradient is not None else leaving


def out_of_memory_errors(device: torch.device) -> int:
    """How often torch's allocator has found no memory on a CUDA device, for whomever."""
    return int(torch.cuda.memory_stats_as_nested_dict(device).get("num_ooms", 0))
