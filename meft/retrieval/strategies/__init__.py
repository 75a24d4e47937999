"""The strategies, and which one an adapter uses."""

from __future__ import annotations

import torch

from ...config import MEFTConfig
from .base import Strategy
from .device_keys import DeviceKeys
from .device_rows import DeviceRows
from .host import Host
from .in_place import InPlace
from .resident import Resident, capturing
from .stream import Stream

__all__ = ["DEVICE_STRATEGIES", "STRATEGIES", "UNKNOWN_DEVICE", "Strategy", "capturing", "strategy_name"]

# In order of preference, as far as their parts on the device fit. This is the only list of them.
STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy for strategy in (Resident, DeviceRows, DeviceKeys, Stream, Host, InPlace)
}
# Those for a model on a device.
DEVICE_STRATEGIES = tuple(name for name, strategy in STRATEGIES.items() if strategy.placement is not None)
UNKNOWN_DEVICE = Stream.name  # what is planned where nobody has said how much memory the device has
# Those that can be asked for, the one with the least on the device first.
MEFTConfig.choices["retrieval"] += tuple(
    strategy.name for strategy in reversed(STRATEGIES.values()) if strategy.placement == "host"
)


def strategy_name(config: MEFTConfig, device: torch.device, *, apart: bool = False) -> str | None:
    """The strategy of a configuration for a model on a device; None: the one that fits (`retrieval="auto"`).

    Args:
        apart: whether rows are to cross although the model is on the CPU.
    """
    if not config.on_host:
        return Resident.name if device.type == "cuda" or apart else InPlace.name
    if config.retrieval != "auto":
        return config.retrieval
    if device.type == "cuda":
        return None
    return InPlace.name if device.type == "cpu" and not apart else Host.name
