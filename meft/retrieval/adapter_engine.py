"""The engine of an adapter whose layers may be on several devices: an engine for each device then.

A device map (accelerate's `dispatch_model`, transformers' `device_map`) spreads a model's layers over devices. Rows go
to the device of their layer, so streams, buffers, copies of tables and plans are made for each device, for its layers
alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..config import MEFTConfig
from ..table.layer_rows import LayerRows
from .engine import Engine
from .engine_setup import Chooser


class AdapterEngine(Engine):
    """Moves the rows of one adapter: by itself where all of its layers are on one device.

    Args:
        devices: of each layer, where it computes as far as its modules tell.
    """

    def __init__(
        self,
        config: MEFTConfig,
        layers: list[LayerRows],
        choose: Chooser | None,
        room: Callable[[torch.device], int] | None,
        devices: Callable[[], list[torch.device]],
    ) -> None:
        super().__init__(config, layers, choose, room)
        self.devices = devices
        self._ask_again()

    def _ask_again(self) -> None:
        self._known: list[torch.device] = []  # of each layer
        self._seen: dict[
            int, tuple[torch.device, torch.device]
        ] = {}  # layer -> what its modules told, and where its input was
        self._engines: dict[torch.device, Engine] = {}  # none where there is one device
        self._by_layer: list[tuple[Engine, LayerRows]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "devices": self.devices}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.devices = state.pop("devices")
        super().__setstate__({**state})
        self._ask_again()

    def at(self, layer: LayerRows, device: torch.device) -> tuple[Engine, LayerRows]:
        """The engine for a layer whose input is on a device, and the layer's place among those of that device."""
        # Each layer of each pass asks: mostly without another call.
        if self._reads_in_place.get(device) or self.reads_in_place(device):
            return self, layer
        number = layer.number
        if number >= len(self._known) or self._known[number] != device:
            self._divide(self._expected(number, device))
        return self._by_layer[number]

    def _expected(self, number: int, device: torch.device) -> list[torch.device]:
        """Of each layer, now that the input of one is on a device; others whose modules tell the same will be too."""
        told = self.devices()
        self._seen[number] = (told[number], device)
        alike = dict(self._seen.values())
        return [self._seen[i][1] if self._seen.get(i, ("",))[0] == d else alike.get(d, d) for i, d in enumerate(told)]

    def _divide(self, devices: list[torch.device]) -> None:
        """Give each device an engine for its layers; one whose layers are the same stays."""
        if self.config.device_rows and len(set(devices)) > 1:
            raise RuntimeError(
                f"device_rows={self.config.device_rows!r} is not supported for a model whose layers are on several "
                "devices: set device_rows=0."
            )
        before, old = self._known, self._engines
        self._known, self._engines = devices, {}
        self._by_layer = [(self, layer) for layer in self.layers]
        if len(set(devices)) == 1:
            return
        self._forget()
        for device in dict.fromkeys(devices):
            numbers = [i for i, d in enumerate(devices) if d == device]
            engine = old.get(device)
            if engine is None or numbers != [i for i, d in enumerate(before) if d == device]:
                layers = [replace(self.layers[i], number=place) for place, i in enumerate(numbers)]
                engine = Engine(self.config, layers, self.choose)
                engine.on_gradient, engine.update_queue = self.on_gradient, self.update_queue
                if self._given is not None:
                    engine.use(self._given)
            self._engines[device] = engine
            for number, layer in zip(numbers, engine.layers, strict=True):
                self._by_layer[number] = (engine, layer)

    # ------------------------------------------------------------------ what all of them do

    def begin_pass(self) -> None:
        super().begin_pass()
        for layer in self.layers:
            if layer.choice is not None:
                layer.choice.prepare()
        for engine in self._engines.values():
            engine.begin_pass()

    @property
    def strategy_name(self) -> str | None:
        """The strategy in use, or those of the devices; None before the first pass, and where rows are in place."""
        if not self._engines:
            return super().strategy_name
        names = [name for engine in self._engines.values() if (name := engine.strategy_name) is not None]
        return ", ".join(dict.fromkeys(names)) or None
