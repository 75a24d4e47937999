"""A transformer FFN with the sparse adapter beside it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_bridge.torch_private import NotReplicated

from .config import MEFTConfig
from .ffn_call import FFNCall
from .load_balancing import attach_balance_loss
from .retrieval import forward_context as context
from .retrieval.engine import Engine
from .retrieval.second_order import check_not_transformed
from .retrieval.types import check_versions
from .routing.router import Router, Routers, untrained
from .table.layer_rows import LayerRows
from .table.row_table import RowTable
from .transport.transfer import Traffic

NOT_MERGEABLE = (
    "MEFT cannot be merged: its routed ReLU neurons are no linear map of the weights. Keep the adapter beside the "
    "model, or write both as one model folder with `aslora-meft export DIR --to model OUT`."
)

_NOTHING: AbstractContextManager[object] = nullcontext()


class LayerSlot(NamedTuple):
    """A layer's rows in one adapter, and the adapter's engine."""

    engine: Engine
    rows: LayerRows


class MEFTLayer(NotReplicated, BaseTunerLayer):
    """y = FFN(x) + sum over the active adapters of sum_{j in J} ReLU(s_j) v_j.

    Attributes:
        meft_keys, meft_values: adapter -> its `RowTable` [r, d].
        meft_router: adapter -> its `Router`, W_g [E, d], on the model's device.
        traffic: adapter -> what this layer has moved.
        places: adapter -> its engine and this layer's part in it.
    """

    adapter_layer_names = ("meft_keys", "meft_values", "meft_router")
    other_param_names = ("configs", "traffic", "places")

    def __init__(self, base_layer: nn.Module, width: int, up: nn.Module | None = None) -> None:
        """Args: width: hidden size d. up: as in `FFNCall`."""
        super().__init__()
        self.base_layer = base_layer
        self.in_features = self.out_features = width
        self.meft_keys = nn.ModuleDict()
        self.meft_values = nn.ModuleDict()
        self.meft_router = Routers()
        self.configs: dict[str, MEFTConfig] = {}
        self.traffic: dict[str, Traffic] = {}
        self.places: dict[str, LayerSlot] = {}
        self.on_backward: Callable[[], None] | None = None  # set by the tuner
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        module = base_layer.get_base_layer() if isinstance(base_layer, BaseTunerLayer) else base_layer
        self.call = FFNCall(module, up, self._begin_active)

    def update_layer(self, adapter_name: str, config: MEFTConfig) -> None:
        """Add an adapter's keys, values and router."""
        base_device, base_dtype = self._base_device_and_dtype()
        # A default device (torch.set_default_device) takes nothing but what a model without values gets; one that is
        # offloaded has values.
        empty = base_device.type == "meta" and torch.get_default_device().type == "meta"
        made_on = "meta" if empty else "cpu"
        master = getattr(torch, config.master_dtype)
        if config.row_dtype != "auto":
            compute_dtype = getattr(torch, config.row_dtype)
        else:
            compute_dtype = base_dtype if base_dtype.itemsize < master.itemsize else master
        kept: dict[str, Any] = {"on_host": config.on_host, "pin": config.pin_memory, "mode": config.row_rule.moments}
        tables = [
            RowTable((config.r, self.in_features), master=master, compute_dtype=compute_dtype, device=made_on, **kept)
            for _ in range(2)
        ]
        router = Router(config.experts, self.in_features, torch.promote_types(base_dtype, torch.float32), made_on)
        self.configs[adapter_name], self.traffic[adapter_name] = config, Traffic(experts=config.experts)
        self.meft_keys[adapter_name], self.meft_values[adapter_name] = tables
        self.meft_router[adapter_name] = router
        self.join(adapter_name, 0, None)
        if not tables[0].rows.is_meta:
            self._initialise(adapter_name, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def join(self, adapter_name: str, number: int, engine: Engine | None) -> LayerRows:
        """Take a place among the adapter's layers.

        Args:
            engine: None: one for this layer alone.
        """
        keys, values = self.tables(adapter_name)
        keys.name, values.name = f"keys of layer {number}", f"values of layer {number}"
        keys.turn, values.turn = 2 * number, 2 * number + 1
        rows = LayerRows(number, keys, values, self.configs[adapter_name], self.traffic[adapter_name])
        self.places[adapter_name] = LayerSlot(engine if engine is not None else Engine(rows.config, [rows]), rows)
        return rows

    def _initialise(self, adapter_name: str, config: MEFTConfig) -> None:
        keys, values = self.tables(adapter_name)
        keys.fill(0.02)
        values.fill(None if config.init_weights else 0.02)
        router = self.router(adapter_name)
        if router.is_meta:
            return
        each = config.r // config.experts
        with torch.no_grad():
            for expert in range(config.experts):
                mean = keys.rows[expert * each : (expert + 1) * each].mean(0)
                router[expert].copy_(float(config.router_init_scale) * mean)

    def tables(self, adapter_name: str) -> tuple[RowTable, RowTable]:
        """Keys and values of an adapter."""
        return self.meft_keys[adapter_name], self.meft_values[adapter_name]  # type: ignore[return-value]

    def router(self, adapter_name: str) -> nn.Parameter:
        """W_g of an adapter, [E, d]."""
        return self.meft_router[adapter_name].weight  # type: ignore[return-value]

    # ------------------------------------------------------------------ PEFT's frame

    def __getattr__(self, name: str) -> Any:
        """What some models read of an FFN beside calling it (X-MOD's `output.adapter_modules`)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "base_layer":  # hooks and the like are each module's own
                raise
            return getattr(self.get_base_layer(), name)

    def _base_device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        """Of the FFN's first floating-point parameter; where all are packed (4 bit), what they are computed in."""
        parameters = list(self.base_layer.parameters())
        floating = [p.dtype for p in parameters if p.is_floating_point()]
        device = parameters[0].device if parameters else torch.device("cpu")
        computed = [getattr(module, "compute_dtype", None) for module in self.base_layer.modules()]
        known = [dtype for dtype in (*floating, *computed) if isinstance(dtype, torch.dtype)]
        return device, known[0] if known else torch.get_default_dtype()

    @property
    def device(self) -> torch.device:
        """Of the FFN's parameters."""
        return self._base_device_and_dtype()[0]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Rows stay where they are (on_host) and in their dtype; the inherited one would cast all to the base's dtype.
        target = device if device is not None else self.device
        if target.type == "meta" or any(
            p.is_meta for p in (self.router(adapter_name), *self.meft_keys[adapter_name].parameters())
        ):
            return
        router = self.router(adapter_name)
        router.data = router.data.to(target)
        for table in self.tables(adapter_name):
            table.to(target)

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    # ------------------------------------------------------------------ forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The FFN's output, with the adapters' contributions in its dtype."""
        return self.call(self.base_layer, args, kwargs)

    def _begin_active(self, x: Tensor) -> Callable[[], Tensor] | None:
        """Begin with what the active adapters add to the FFN's output for the input x; rows come while it computes."""
        active = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.configs]
        if not active:
            return None
        begin, finish = self._begin, self._finish
        if torch.compiler.is_compiling():  # torch.compile leaves both alone: its graph breaks there
            begin, finish = torch.compiler.disable(begin), torch.compiler.disable(finish)
        return partial(finish, begin(x, active), x)

    def _begin(self, x: Tensor, active: list[str]) -> list[Callable[[], Tensor]]:
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"The FFN's input has {x.shape[-1]} features, MEFT was made for {self.in_features}: target_modules "
                "must name modules that map hidden states to hidden states."
            )
        read = (t for name in active for t in (self.router(name), *(table.rows for table in self.tables(name))))
        check_not_transformed(itertools.chain([x], read))
        with _as_given(x):
            return [self._begin_one(x.reshape(-1, x.shape[-1]), x.shape, name) for name in active]

    def _finish(self, pending: list[Callable[[], Tensor]], x: Tensor) -> Tensor:
        with _as_given(x):
            first, *others = [finish() for finish in pending]
            return sum(others, first).view(x.shape)

    def _begin_one(self, x: Tensor, shape: torch.Size, adapter_name: str) -> Callable[[], Tensor]:
        """Begin with an adapter's output; what is returned ends it: [T, d]."""
        slot = self.places[adapter_name]
        engine, layer = slot.engine.at(slot.rows, x.device)
        key = (id(self), adapter_name)
        now, saved = context.current(), None
        if now is None and context.in_checkpoint_recompute():
            found = context.find_saved(key, x)
            if found is not None:
                now, saved = found
                check_versions(saved.versions, layer.versions)
        if saved is None:
            _look_at_rows(layer, x.device)
        real = saved.real if saved is not None else None
        if saved is None and now is not None and now.mask is not None:
            real = context.real_tokens(now, shape, x.device, self.call.up is not None)
        kept = x if real is None else x.index_select(0, real)
        wide = kept.to(torch.promote_types(x.dtype, torch.float32))
        choice, keys, values, router = layer.choice, layer.keys, layer.values, self.router(adapter_name)
        fixed = choice is not None and (choice.counts or (keys.versions or values.versions) is not None)
        logits = F.linear(wide, (untrained(router) if fixed else router).to(wide))  # offloaded, it may be elsewhere
        inputs = wide.to(engine.compute_dtype(layer, kept))
        known = (saved.selection, saved.rows) if saved is not None else (None, None)
        pending = engine.select(layer, inputs.detach(), logits.detach(), *known)
        saved_selections = [] if saved is None else [saved]
        if saved is not None:
            saved.rows = None
            if saved.refetched and now is not None:
                _gather_below(now, engine, layer)
        fingerprint, refetches, refetch = None, False, False
        if torch.is_grad_enabled() or (now is not None and now.recorded):
            checkpointed, refetches = context.checkpointed(), engine.refetches(x.device)
            # Of a checkpointed layer the rows are kept for its recomputation, whose graph then has them.
            refetch = refetches and not checkpointed and not context.in_checkpoint_recompute()
            if saved is None and now is not None and now.recorded and checkpointed:
                fingerprint = context.input_fingerprint(x)  # now: the base FFN may write into its input
        version = None if wide.is_inference() else wide._version  # an inference tensor counts no writes

        def finish() -> Tensor:
            if version is not None and wide._version != version:
                raise RuntimeError(
                    "The FFN writes into its own input, which the adapter beside it still reads: let the FFN write "
                    "into a copy."
                )
            if fingerprint is not None:
                rows = engine.gather(pending)
                keeps = not (refetches or pending.on_host)
                made = context.SavedSelection(
                    layer, pending.selection, real, fingerprint, layer.versions, rows if keeps else None,
                    refetches,
                )  # fmt: skip
                now.selections.setdefault(key, []).append(made)  # type: ignore[union-attr]
                saved_selections.append(made)
            y = engine.sparse_ffn(pending, inputs, logits, refetch, partial(self._done, now, saved_selections))
            if layer.config.router_aux_loss_coef and torch.is_grad_enabled():
                y = attach_balance_loss(y, logits, layer.config, now)
            return y if real is None else x.new_zeros(x.shape, dtype=y.dtype).index_copy(0, real, y)

        if not pending.on_host:
            return finish
        y = finish()  # nothing would run beside the base FFN, which may write into its input
        return lambda: y

    def _done(self, now: context.ForwardContext | None, saved_selections: list[context.SavedSelection]) -> None:
        """Row gradients were made, by the backward pass that a selection was saved for."""
        if now is not None:
            for one in saved_selections:
                now.release(one)
        if self.on_backward is not None:
            self.on_backward()


def _gather_below(now: context.ForwardContext, engine: Engine, layer: LayerRows) -> None:
    """Queue the way of the rows that the recomputation of the layer below will read, if it is on this device too."""
    wanted = engine.layers[layer.number - 1] if layer.number else None
    below = [saved for made in now.selections.values() for saved in made if saved.layer is wanted]
    if len(below) == 1 and below[0].refetched and below[0].selection is not None and below[0].rows is None:
        below[0].refetched = False  # once
        below[0].rows = engine.gather_below(layer, below[0].selection)


def _look_at_rows(layer: LayerRows, device: torch.device) -> None:
    """A pass comes, for which the tables have to be as their owners left them, and where the model is."""
    for table in (layer.keys, layer.values):
        table.look()
        if not table.on_host and table.masters.device != device:  # as the router
            table.to(device)


def _as_given(x: Tensor) -> AbstractContextManager[object]:
    """Without autocast: scores decide, and are computed in full precision."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NOTHING
