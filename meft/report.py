"""What an adapter has moved and used, as numbers and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .layer import MEFTLayer
from .transport.transfer import Traffic

_SUMS = (
    "forwards",
    "tokens",
    "union_rows",
    "bytes_to_device",
    "bytes_to_host",
    "hot_rows",
    "rows_entered",
    "rows_stepped_on_device",
    "bytes_saved",
    "bytes_zero_copy",
    "stall_ms",
    "host_ms",
    "ring_stalls",
)


@dataclass(frozen=True)
class TransferReport:
    """Counters of an adapter; see `meft.transport.transfer.Traffic`.

    Attributes:
        adapter_name: the adapter.
        r: neurons a layer.
        strategy: the retrieval strategy in use; None where rows are read in place.
        layers: path of the FFN -> its counters.
        refused: what was asked for and this machine refuses, so far: 'pin_memory' (rows in pageable memory cross more
            slowly), 'zero_copy' (the host steps the rows).
    """

    adapter_name: str
    r: int
    strategy: str | None
    layers: dict[str, Traffic]
    refused: tuple[str, ...] = ()

    def _sum(self, name: str) -> float:
        return sum(getattr(traffic, name) for traffic in self.layers.values())

    def totals(self) -> dict[str, float]:
        """Sums over the layers."""
        return {name: self._sum(name) for name in _SUMS}

    def scalars(self, before: dict[str, float]) -> dict[str, float]:
        """For a log: what has come since earlier totals, and how even the picks have been so far."""
        new = {name: value - before.get(name, 0) for name, value in self.totals().items()}
        return {
            "meft/union_share": new["union_rows"] / max(1, new["forwards"] * self.r),
            "meft/mib_to_device": new["bytes_to_device"] / 2**20,
            "meft/mib_to_host": new["bytes_to_host"] / 2**20,
            "meft/mib_saved": new["bytes_saved"] / 2**20,
            "meft/hot_share": new["hot_rows"] / max(1, new["union_rows"]),
            "meft/stall_ms": new["stall_ms"],
            "meft/host_ms": new["host_ms"],
            "meft/busiest_expert_share": self.busiest_expert_share,
            "meft/idle_expert_share": self.idle_expert_share,
            "meft/top_rows_share": self.top_rows_share,
        }

    @property
    def hot_share(self) -> float:
        """Share of the rows that forward passes used that had a place on the device (`device_rows`)."""
        return self._sum("hot_rows") / max(1, self._sum("union_rows"))

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

    @property
    def top_rows_share(self) -> float:
        """Mean over layers of the share of all picks that go to the tenth of the neurons that is picked most."""
        loads = [load for t in self.layers.values() if len(load := t.row_load) and int(load.sum())]
        shares = [float(load.topk(max(1, self.r // 10)).values.sum() / load.sum()) for load in loads]
        return sum(shares) / len(shares) if shares else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Sums over the layers, and the means above."""
        shares = ("union_share", "hot_share", "busiest_expert_share", "idle_expert_share", "top_rows_share")
        head = {"adapter_name": self.adapter_name, "r": self.r, "strategy": self.strategy}
        return {
            **head,
            "refused": list(self.refused),
            **self.totals(),
            **{name: getattr(self, name) for name in shares},
        }

    def __str__(self) -> str:
        lines = [
            ("retrieval", self.strategy or "in place"),
            ("refused by this machine", ", ".join(self.refused) or "nothing"),
            ("host to device", f"{self._sum('bytes_to_device') / 2**20:,.1f} MiB"),
            ("device to host", f"{self._sum('bytes_to_host') / 2**20:,.1f} MiB"),
            ("waited for", f"{self._sum('stall_ms'):,.0f} ms"),
            ("neurons used a pass and layer, |U| / r", f"{self.union_share:.3f}"),
            ("busiest expert's load / even load", f"{self.busiest_expert_share:.2f}"),
            ("experts never used", f"{self.idle_expert_share:.1%}"),
        ]
        if self._sum("rows_entered"):
            lines += [
                ("used rows that were on the device", f"{self.hot_share:.1%}"),
                ("rows that got a place there", f"{self._sum('rows_entered'):,.0f}"),
                ("did not cross because of it", f"{self._sum('bytes_saved') / 2**20:,.1f} MiB"),
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
    first = next(iter(adapted.values()))
    engine = first.places[adapter_name].engine
    counters = {path: layer.traffic[adapter_name] for path, layer in adapted.items()}
    return TransferReport(adapter_name, first.configs[adapter_name].r, engine.strategy_name, counters, engine.refused)
