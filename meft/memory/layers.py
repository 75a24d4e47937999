"""The layers of an adapter, whatever wraps the model."""

from __future__ import annotations

from torch import nn

from ..layer import MEFTLayer


def layers_of(model: nn.Module, adapter_name: str | None) -> tuple[str, dict[str, MEFTLayer]]:
    """Name of an adapter (None: the active one), and path in the model -> FFN that has it.

    Raises: ValueError: there is no such adapter.
    """
    found = {path: module for path, module in model.named_modules() if isinstance(module, MEFTLayer)}
    active = next((name for layer in found.values() for name in layer.active_adapters), None)
    name = active if adapter_name is None else adapter_name
    layers = {path: layer for path, layer in found.items() if name in layer.configs}
    if name is None or not layers:
        raise ValueError(f"adapter_name={adapter_name!r} is no MEFT adapter of this model.")
    return name, layers


def check_background(model: nn.Module) -> None:
    """Check the counts that adapters choose their rows by, if any, before the first pass.

    Raises: ValueError: they cannot be read, or are of another adapter.
    """
    for layer in model.modules():
        for slot in layer.places.values() if isinstance(layer, MEFTLayer) else ():
            if slot.rows.choice is not None:
                slot.rows.choice.prepare()
