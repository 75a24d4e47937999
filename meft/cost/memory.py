"""What MEFT costs before anything is allocated: bytes on the device, bytes on the host, bytes across the link.

Pure arithmetic over shapes, in the terms of `meft.retrieval.costs`; what depends on the strategy is said by its class.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..gradient.offload_ring import SLOTS
from ..retrieval.costs import FP32, ID, AdapterShape, Flow, Rows, Work
from ..retrieval.strategies import STRATEGIES, Strategy
from .hot_rows import HotRows, place_bytes

__all__ = ["FP32", "AdapterShape", "Flow", "Plan", "Rows", "Work"]


@dataclass(frozen=True)
class Plan:
    """A strategy for an adapter and its work.

    Attributes:
        hot: share of the rows that have a place on the device (`device_rows`), 0 to 1.

    Raises:
        ValueError: a strategy that there is not, or a size out of its range.
    """

    shape: AdapterShape
    work: Work
    strategy: str
    hot: float = 0.0

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy={self.strategy!r} is unknown: use one of {', '.join(STRATEGIES)}.")
        if self.work.rows not in ("save", "refetch"):
            raise ValueError(f"rows={self.work.rows!r} is unknown: use save or refetch.")
        if not 1 <= self.work.union <= self.shape.r:
            raise ValueError(f"union={self.work.union} must be from 1 to r={self.shape.r}.")
        if self.work.tokens < 1 or self.work.accumulation < 1:
            raise ValueError(f"tokens={self.work.tokens} and accumulation={self.work.accumulation} must be at least 1.")

    @property
    def way(self) -> type[Strategy]:
        """The strategy's class."""
        return STRATEGIES[self.strategy]

    @property
    def hot_rows(self) -> HotRows:
        """Of the share that have a place."""
        return HotRows(self.hot, self.way.selects_on_host)

    def on_host(self) -> Plan:
        """What is left to the host: the same without rows on the device, for the work of the others."""
        return self if not self.hot else replace(self, work=self.hot_rows.cold(self.shape, self.work), hot=0.0)

    @property
    def step_union(self) -> int:
        """Distinct neurons of a layer that an optimizer step updates."""
        return self.work.touched(self.shape)

    @property
    def union_values(self) -> int:
        """Values of the rows of U of one layer, 2 d |U|."""
        return 2 * self.shape.d * self.work.union

    @property
    def largest_union(self) -> int:
        """The same of the widest layer."""
        return 2 * self.shape.buffered * self.work.union

    @property
    def kept_gradient(self) -> int:
        """Bytes of a value of a row gradient where it is kept: on the host as it came, else in the dtype of sums."""
        wide = max(FP32, self.shape.master)
        as_it_came = self.work.accumulation == 1 and wide == FP32 and not self.way.updates_on_device
        return self.shape.gradient if as_it_came else wide

    @property
    def keeps_rows(self) -> bool:
        """Whether rows are saved for backward; where the tables lie on the device nothing needs to be."""
        return self.work.rows == "save" and not self.way.rows_on_device

    # ------------------------------------------------------------------ device

    def saved_rows(self) -> int:
        """Bytes of the rows of one layer that wait for backward."""
        return self.union_values * self.shape.compute if self.keeps_rows else 0

    def picks(self) -> int:
        """Bytes of one layer's picks that wait for backward: ids, places, factors and scores, [T, K] each; U's ids."""
        return 4 * ID * self.work.tokens * self.shape.top_k + ID * self.work.union

    def router(self) -> int:
        """Bytes of W_g of one layer, [E, d] in fp32; its gradient takes as much, its moments twice as much."""
        return FP32 * self.shape.experts * self.shape.d

    def row_buffers(self) -> int:
        """Bytes for the rows of the layer at work, and of the next one where they are fetched ahead in backward."""
        ahead = self.work.rows == "refetch" and not self.way.rows_on_device
        return self.largest_union * self.shape.compute * (2 if ahead else 1)

    def row_gradients(self) -> int:
        """Bytes of row gradients on the device: one layer's in fp32 and as they leave; those of a step if they stay."""
        s = self.shape
        if self.way.updates_on_device:
            return 2 * s.layers * s.d * self.step_union * FP32
        return self.largest_union * (FP32 + s.gradient)

    def places(self) -> int:
        """Bytes of rows that have a place on the device, with their moments and gradients."""
        s = self.shape
        return round(self.hot * s.layers * s.r) * place_bytes(s, values_alone=self.way.selects_on_host)

    def forward_temporaries(self) -> int:
        """Bytes of one layer's forward pass: x in fp32 for the router, logits, and the candidates of a token."""
        s, T = self.shape, self.work.tokens
        candidates = 0 if self.way.selects_on_host else s.probed * -(-s.r // s.experts)
        return T * FP32 * (s.buffered + s.experts + candidates)

    def backward_temporaries(self) -> int:
        """Bytes of one layer's backward pass: activations, ds and ds c as [T, U], dp as [T, E], dx in fp32."""
        s, T = self.shape, self.work.tokens
        return T * (3 * s.base * self.work.union + FP32 * (s.experts + s.buffered))

    def device_bytes(self) -> dict[str, int]:
        """Bytes on the device by part, all layers; without the base model and its activations."""
        s, L = self.shape, self.shape.layers
        stay = self.way.updates_on_device
        return {
            "router": L * self.router(),
            "adapter": self.way.tables(s),
            "optimizer": 2 * L * self.router() + (s.moments if stay else 0),
            "gradients": L * self.router() + (self.row_gradients() if stay else 0),
            "saved rows": L * self.saved_rows(),
            "key buffers": self.way.buffers(s),
            "buffers": self.row_buffers() + (0 if stay else self.row_gradients()),
            "hot rows": self.places(),
            "activations": L * self.picks() + max(self.forward_temporaries(), self.backward_temporaries()),
        }

    # ------------------------------------------------------------------ host

    def host_bytes(self) -> dict[str, int]:
        """Bytes in host memory by part, all layers; what is page-locked says so."""
        s = self.shape
        if self.way.updates_on_device:
            return {}
        compute, master = s.values * s.compute, s.values * s.master
        store = 2 * s.layers * s.d * self.step_union * self.kept_gradient
        separate = s.compute < s.master
        return {
            "compute copy, page-locked": compute if separate else 0,
            "masters" if separate else "masters, page-locked": master,
            "moments": s.moments,
            "gradient store": store,
            "gradient store, kept for larger ones": store // 8,
            "gradient ring, page-locked": SLOTS * self.largest_union * s.gradient,
        }

    # ------------------------------------------------------------------ link

    def flows(self) -> list[Flow]:
        """What crosses for one layer: in each micro-batch, and once per optimizer step."""
        found, hot = list(self.way.flows(self.shape, self.work)), self.hot_rows
        if not self.hot:
            return found
        left = [hot.left(flow, self.shape, self.work) for flow in found]
        return left + list(hot.flows(self.shape, self.work))

    def crossing(self, *, to_device: bool | None = None) -> int:
        """Bytes across the link per optimizer step, all layers: one way, or both."""
        return self.shape.layers * sum(
            flow.bytes * (1 if flow.when == "step" else self.work.accumulation)
            for flow in self.flows()
            if to_device is None or flow.to_device == to_device
        )
