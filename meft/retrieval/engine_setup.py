"""What an engine has made for the device in use: its strategy, streams, queues and page locks.

It is made at the first pass and made anew for inputs of another device or dtype.
"""

from __future__ import annotations

from collections.abc import Callable
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
from ..tier.row_tier import RowTier
from ..tier.size import places
from ..transport.openmp_waiting import check_waiting
from ..transport.streams import CudaStreams, DeviceStreams, HostStreams, streams_of
from .costs import Rows
from .strategies import STRATEGIES, InPlace, Strategy, strategy_name

# For layers of these widths and inputs like x [T, d] on a CUDA device: the strategy, and what happens with the rows
# for the backward pass.
Chooser = Callable[[MEFTConfig, list[int], Tensor], tuple[str, Rows]]


class EngineSetup:
    """The part of an `Engine` that does not look at tokens.

    Attributes:
        update_queue: gives the thread that updates rows beside the computation; one for all devices of an adapter.
        on_gradient: called with a table and its gradient that has left for the host; returns what its table gets.
        streams: of the device in use; None before the first pass that needed some.

    Args:
        layers: the adapter's layers, in the order in which they run.
        choose: what `retrieval="auto"` asks on a CUDA device.
        room: what `device_rows="auto"` asks: bytes of a device that a step leaves free.
    """

    def __init__(
        self,
        config: MEFTConfig,
        layers: list[LayerRows],
        choose: Chooser | None = None,
        room: Callable[[torch.device], int] | None = None,
    ) -> None:
        self.config, self.layers, self.choose, self.room = config, layers, choose, room
        self.tiers: list[RowTier] = []
        self.on_gradient: Callable[[RowTable, RowGradient], RowGradient] | None = None
        self._given: DeviceStreams | None = None
        self._updates: UpdateQueue | None = None
        self.update_queue = self._own_queue
        self._neurons_per_expert = torch.tensor(config.r // config.experts, dtype=torch.int32, device="cpu")
        self._in_place = InPlace(HostStreams(torch.device("cpu")), layers)
        self._forget()

    def _forget(self) -> None:
        for tier in self.tiers:
            tier.close()
        self.tiers = []
        self._for: tuple[Any, ...] | None = None
        self.streams: DeviceStreams | None = None
        self._plan: tuple[str, Rows] | None = None
        self._planned_for: tuple[int, int] | None = None  # by `auto`: tokens, and errors for want of memory until then
        self._strategy: Strategy | None = None
        self._reads_in_place: dict[torch.device, bool] = {}
        self._rings: dict[tuple[torch.dtype, int], GradientRing] = {}  # by dtype and width
        self._below: Any = None

    def __getstate__(self) -> dict[str, Any]:
        kept = ("config", "layers", "choose", "room", "on_gradient")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        on_gradient = state.pop("on_gradient")
        EngineSetup.__init__(self, **state)
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
            self._forget()
            self._for, self.streams = inputs, self._given or streams_of(x.device)
            self._lock_pages(self.streams)
            self._plan = self._planned(x)
            with torch.inference_mode(False):  # its buffers outlive the mode
                strategy = STRATEGIES[self._plan[0]](self.streams, self.layers)
            if self.updates_beside(x.device):
                self._update_beside(self.streams)
                self._make_tiers(self.streams, values_alone=strategy.selects_on_host)
            self._strategy = strategy  # last: what fails for want of memory is made anew with a smaller batch
        return self._strategy

    def _own_queue(self) -> UpdateQueue:
        if self._updates is None:
            self._updates = UpdateQueue()
            check_waiting(updates_beside=True)
        return self._updates

    def _update_beside(self, streams: DeviceStreams) -> None:
        updates = self.update_queue()
        for layer in self.layers:
            layer.keys.updates = layer.values.updates = updates
        if self.config.zero_copy:
            with torch.inference_mode(False):  # as above
                steps = {width: ZeroCopySteps(streams, width) for width in {layer.width for layer in self.layers}}
            for layer in self.layers:
                layer.keys.step = layer.values.step = partial(steps[layer.width], layer.traffic)

    def _make_tiers(self, streams: DeviceStreams, *, values_alone: bool) -> None:
        asked = self.config.device_rows
        if not asked:
            return
        with torch.inference_mode(False):
            for width in dict.fromkeys(layer.width for layer in self.layers):
                layers = [layer for layer in self.layers if layer.width == width]
                part = len(layers) * width / sum(layer.width for layer in self.layers)
                size = partial(self._places, part, streams.device)
                self.tiers.append(RowTier(streams, layers, size, values_alone=values_alone))

    def _places(self, part: float, device: torch.device, rows: int, place_bytes: int, held: int) -> int:
        """Places of a tier that gets a part of what `device_rows` says."""
        asked = self.config.device_rows
        free = self.room(device) + held if asked == "auto" and self.room is not None else 0
        return places(asked, rows, place_bytes, part, free)

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


def out_of_memory_errors(device: torch.device) -> int:
    """How often torch's allocator has found no memory on a CUDA device, for whomever; 0 elsewhere."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.memory_stats_as_nested_dict(device).get("num_ooms", 0))
