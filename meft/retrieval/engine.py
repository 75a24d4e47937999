"""The engine of one adapter: selects neurons, gathers their rows beside the base FFN, and sends their gradients back.

How it does so is up to its strategy (`meft.retrieval.strategies`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from adapter_kernels import table_ffn

from ..gradient.offload_ring import GradientRing
from ..gradient.row_gradient import RowGradient
from ..table.layer_rows import LayerRows
from ..transport.profiling import phase
from .engine_setup import EngineSetup, out_of_memory_errors
from .gather import experts_of
from .refetch import RefetchedRows, refetched_in_backward
from .second_order import AsRowGradient
from .sparse_ffn import SparseFFN, output_of
from .strategies import Strategy, capturing
from .types import GatheredRows, PendingForward, Selection, check_versions

_LEAST_SLOT = 256  # rows of a staging buffer, however few the first gradient has: a batch of padding has none

_NOTHING: AbstractContextManager[None] = nullcontext()


class Engine(EngineSetup):
    """Moves the rows of one adapter; arguments as of `EngineSetup`."""

    # ------------------------------------------------------------------ forward

    def at(self, layer: LayerRows, device: torch.device) -> tuple[Engine, LayerRows]:
        """The engine for a layer whose input is on a device, and the layer's place in it: see `AdapterEngine`."""
        return self, layer

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
            if layer.tier is not None:
                layer.tier.settle()
        else:
            self._check_graphs(x)
            if selection is None and not layer.number and self._planned_for is not None:
                tokens, errors = self._planned_for
                # What fits beside fewer tokens (an evaluation, a short batch) may not fit beside these; nor what did
                # before an optimizer, another adapter or another process took memory, if it has run out since.
                if len(x) > tokens or out_of_memory_errors(x.device) > errors:
                    self._forget()
            strategy = self._prepare(layer, x)
            if selection is None and not layer.number:
                for tier in self.tiers:
                    errors, by_room = out_of_memory_errors(x.device), self.config.device_rows == "auto"
                    tier.begin_pass(len(x), errors, sized_by_room=by_room)
        if layer.keys.updates is not None:
            layer.wait_for_updates()
        if layer.tier is not None:
            layer.tier.land()
        # Without a graph nobody asks later whether rows are still those.
        versions = layer.versions if torch.is_grad_enabled() else None
        if selection is not None:
            if rows is None:
                with phase("gather rows"):
                    rows = strategy.gather(layer, selection)
            layer.count(x.shape[0], selection.host_rows)
            return PendingForward(layer, selection, rows, versions, True, strategy.in_place)
        if strategy.in_place:  # nothing runs beside the base FFN
            selection, rows = strategy.select(layer, x, logits)()
            layer.count(x.shape[0], selection.host_rows)
            return PendingForward(layer, selection, rows, versions, False, True)
        with phase("select"):
            gather = strategy.select(layer, x, logits)
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
            pending.layer.count(pending.selection.position.shape[0], pending.selection.host_rows)
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
        layer, rows, selection = pending.layer, self.gather(pending), pending.selection
        assert selection is not None
        pending.rows = None  # the graph holds `pending`
        held: AbstractContextManager[object] = _NOTHING
        if rows.scores is None:
            rows = self._arrived(pending, selection, rows, x)
        else:  # read where they are, where another thread may step them
            held = layer.values.lock
            if not torch.is_grad_enabled():
                with held:
                    return table_ffn(rows.values, rows.position, rows.scores)
        factors = idle = None
        if self.config.router_factor:
            factors = logits.gather(1, experts_of(selection, self._neurons_per_expert))
        else:
            idle = logits  # its router gets a gradient of zero
        # Sums over tokens pass the range of float16 where their terms do not.
        wide = self.config.gradient_dtype == "float32" or x.dtype == torch.float16
        dtype = torch.promote_types(x.dtype, torch.float32) if wide else x.dtype
        absent: AbstractContextManager[RefetchedRows | None] = _NOTHING
        if refetch:
            absent = refetched_in_backward(self, pending, (rows.keys, rows.values), self._below)
        with absent as self._below, held, phase("sparse FFN"):
            if not torch.is_grad_enabled():
                return output_of(x, factors, rows)
            return SparseFFN.apply(
                x, factors, idle, layer.keys.rows, layer.values.rows, rows, pending, self, dtype, done
            )

    def _arrived(self, pending: PendingForward, selection: Selection, rows: GatheredRows, x: Tensor) -> GatheredRows:
        """Rows as the computation reads them from now on, in x's dtype."""
        if self.streams is not None and not pending.on_host:  # other layers may be on a device
            if not pending.recomputed and self._strategy is not None:
                # Now that the base FFN is queued: the next layer's rows may have to wait for their update.
                self._strategy.prefetch_next(pending.layer, x.shape[0])
            selection.wait_in(self.streams)
            rows = rows.arrived(self.streams)
        return GatheredRows(rows.keys.to(x.dtype), rows.values.to(x.dtype), rows.position)

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
            divided = None
            if layer.tier is not None and owner.tier is not None:
                gradient = gradient.detach().to(dtype)
                divided = layer.tier.divide(owner, rows, gradient)
            if divided is not None:
                rows, gradient, part = divided
            leaving = self._rings[form].send(rows, gradient, table, layer.traffic)
            if divided is not None:
                leaving.keep_on_device(part)
        return self.on_gradient(owner, leaving) if self.on_gradient is not None else leaving
