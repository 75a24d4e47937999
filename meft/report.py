"""What an adapter has moved and used, as numbers and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .layer import MEFTLayer
from .transfer import Traffic


@dataclass(frozen=True)
class TransferReport:
    """Counters of an adapter; see `meft.transfer.Traffic`.

    Attributes:
        adapter_name: the adapter.
        r: neurons a layer.
        layers: path of the FFN -> its counters.
    """

    adapter_name: str
    r: int
    layers: dict[str, Traffic]

    def _sum(self, name: str) -> int:
        return sum(getattr(traffic, name) for traffic in self.layers.values())

    @property
    def union_share(self) -> float:
        """Mean of |U| / r over layers and forward passes; 0 before the first."""
        return self._sum("union_rows") / max(1, self._sum("forwards") * self.r)

    @property
    def busiest_expert_share(self) -> float:
        """Mean over layers of the busiest expert's share of all picks, times the number of experts; 1 is even."""
        shares = [
            float(t.expert_load.max() / t.expert_load.sum()) * len(t.expert_load)
            for t in self.layers.values()
            if len(t.expert_load) and int(t.expert_load.sum())
        ]
        return sum(shares) / len(shares) if shares else 0.0

    @property
    def idle_expert_share(self) -> float:
        """Mean over layers of the share of experts without a pick."""
        shares = [float((t.expert_load == 0).float().mean()) for t in self.layers.values() if len(t.expert_load)]
        return sum(shares) / len(shares) if shares else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Sums over the layers, and the means above."""
        sums = {
            name: self._sum(name) for name in ("forwards", "tokens", "union_rows", "bytes_to_device", "bytes_to_host")
        }
        shares = ("union_share", "busiest_expert_share", "idle_expert_share")
        return {
            "adapter_name": self.adapter_name,
            "r": self.r,
            **sums,
            **{name: getattr(self, name) for name in shares},
        }

    def __str__(self) -> str:
        lines = [
            ("host to device", f"{self._sum('bytes_to_device') / 2**20:,.1f} MiB"),
            ("device to host", f"{self._sum('bytes_to_host') / 2**20:,.1f} MiB"),
            ("neurons used a pass and layer, |U| / r", f"{self.union_share:.3f}"),
            ("busiest expert's load / even load", f"{self.busiest_expert_share:.2f}"),
            ("experts never used", f"{self.idle_expert_share:.1%}"),
        ]
        return "\n".join(f"{name:<40}{value:>16}" for name, value in lines)


def transfer_report(adapter_name: str, layers: Mapping[str, MEFTLayer]) -> TransferReport:
    """The counters of an adapter's layers.

    Raises:
        ValueError: there is no such adapter.
    """
    adapted = {path: layer for path, layer in layers.items() if adapter_name in layer.configs}
    if not adapted:
        raise ValueError(f"adapter_name='{adapter_name}' is no MEFT adapter here.")
    r = next(iter(adapted.values())).configs[adapter_name].r
    return TransferReport(adapter_name, r, {path: layer.traffic[adapter_name] for path, layer in adapted.items()})
