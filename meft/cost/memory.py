"""What MEFT costs before anything is allocated: bytes on the device, bytes on the host, bytes across the link.

Pure arithmetic over shapes. d is the hidden size, r the neurons of a layer, T the tokens of a micro-batch, U its union:
the distinct neurons that its tokens picked in one layer. A row is d values of the wire dtype, one neuron's key or
value. Where a strategy keeps what:

    resident      wire, masters and moments on the device; nothing crosses
    device-rows   wire keys and values on the device; masters and moments on the host
    device-keys   wire keys on the device; values are gathered
    stream        the keys of the next layer are copied under the compute of this one; values are gathered
    host          hidden states go down, picks and the rows of U come up (arXiv 2406.04984)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..config import MEFTConfig
from ..gradient.offload_ring import SLOTS

STRATEGIES = ("resident", "device-rows", "device-keys", "stream", "host")  # in order of preference
ID = 4  # bytes of the int32 of a neuron or a place
FP32 = 4
When = Literal["forward", "backward", "step"]
Rows = Literal["save", "refetch"]


@dataclass(frozen=True)
class AdapterShape:
    """The sizes of an adapter.

    Attributes:
        d: hidden size; where layers have several, their mean, rounded up.
        layers: adapted FFNs.
        r, experts, probed, top_k: of `MEFTConfig`, per layer; probed and top_k per token.
        wire, master, moment, base, gradient: bytes of a value of the rows as they are read, of the masters, of each of
            the two moments, of the hidden states, and of row gradients on their way to the host.
        widest: the largest hidden size of a layer, which buffers are for; 0: d.
    """

    d: int
    layers: int
    r: int
    experts: int
    probed: int
    top_k: int
    wire: int = 2
    master: int = 4
    moment: int = 4
    base: int = 2
    gradient: int = 2
    widest: int = 0

    @classmethod
    def of(cls, config: MEFTConfig, *, d: int, layers: int, base_dtype: torch.dtype) -> AdapterShape:
        """The sizes of a configuration; base_dtype is the dtype of the hidden states (bfloat16 for an NF4 base)."""
        master = getattr(torch, config.master_dtype).itemsize
        own = base_dtype if config.row_dtype == "auto" else getattr(torch, config.row_dtype)
        wire = min(own.itemsize, master)
        moment = 8 if config.master_dtype == "float64" else FP32
        narrow = own == base_dtype == torch.bfloat16 and config.gradient_dtype == "auto"
        return cls(
            d, layers, config.r, config.experts, config.probed, config.top_k, wire, master, moment,
            base_dtype.itemsize, wire if narrow else max(FP32, wire),
        )  # fmt: skip

    @classmethod
    def of_layers(cls, config: MEFTConfig, widths: Sequence[int], *, base_dtype: torch.dtype) -> AdapterShape:
        """As `of`, from the hidden size of each layer."""
        shape = cls.of(config, d=-(-sum(widths) // len(widths)), layers=len(widths), base_dtype=base_dtype)
        return replace(shape, widest=max(widths))

    @property
    def buffered(self) -> int:
        """Hidden size of what passes through buffers."""
        return max(self.d, self.widest)

    @property
    def values(self) -> int:
        """Trainable values of all keys and values, 2 L r d."""
        return 2 * self.layers * self.r * self.d


@dataclass(frozen=True)
class Work:
    """What an optimizer step is made of.

    Attributes:
        tokens: T of a micro-batch.
        union: |U|, distinct neurons that a micro-batch picks in one layer, 1 to r.
        accumulation: micro-batches of an optimizer step.
        rows: 'save' keeps the rows of U on the device from forward to backward, 'refetch' gathers them again.
        step_union: distinct neurons of all micro-batches of a step; None: the most there can be, accumulation |U|.
    """

    tokens: int
    union: int
    accumulation: int = 1
    rows: Rows = "save"
    step_union: int | None = None


@dataclass(frozen=True)
class Flow:
    """One thing that crosses the link, of one layer.

    Attributes:
        what: its name.
        to_device: its direction.
        when: 'forward' and 'backward' of each micro-batch, or 'step': once per optimizer step.
        elements, bytes: its size.
    """

    what: str
    to_device: bool
    when: When
    elements: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """A strategy for an adapter and its work.

    Raises:
        ValueError: a strategy that there is not, or a size out of its range.
    """

    shape: AdapterShape
    work: Work
    strategy: str

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
    def step_union(self) -> int:
        """Distinct neurons of a layer that an optimizer step updates."""
        if self.work.step_union is not None:
            return self.work.step_union
        return min(self.shape.r, self.work.accumulation * self.work.union)

    @property
    def union_values(self) -> int:
        """Values of the rows of U of one layer, 2 d |U|."""
        return 2 * self.shape.d * self.work.union

    @property
    def largest_union(self) -> int:
        """The same of the widest layer."""
        return 2 * self.shape.buffered * self.work.union

    @property
    def keeps_rows(self) -> bool:
        """Whether rows are saved for backward; where the tables lie on the device nothing needs to be."""
        return self.work.rows == "save" and self.strategy not in ("resident", "device-rows")

    # ------------------------------------------------------------------ device

    def saved_rows(self) -> int:
        """Bytes of the rows of one layer that wait for backward."""
        return self.union_values * self.shape.wire if self.keeps_rows else 0

    def picks(self) -> int:
        """Bytes of one layer's picks that wait for backward: ids, places, factors and scores, [T, K] each; U's ids."""
        return 4 * ID * self.work.tokens * self.shape.top_k + ID * self.work.union

    def router(self) -> int:
        """Bytes of W_g of one layer, [E, d] in fp32; its gradient takes as much, its moments twice as much."""
        return FP32 * self.shape.experts * self.shape.d

    def tables(self) -> int:
        """Bytes of keys and values of all layers on the device."""
        s = self.shape
        wire_copy = s.wire if s.wire < s.master else 0  # else the masters themselves are read
        each = {"resident": s.master + wire_copy, "device-rows": s.wire, "device-keys": s.wire / 2}
        return int(s.values * each.get(self.strategy, 0))

    def key_buffers(self) -> int:
        """Bytes of the two key tables that take turns, not per layer."""
        return 2 * self.shape.r * self.shape.buffered * self.shape.wire if self.strategy == "stream" else 0

    def row_buffers(self) -> int:
        """Bytes for the rows of the layer at work, and of the next one where they are fetched ahead in backward."""
        ahead = self.work.rows == "refetch" and self.strategy in ("host", "stream", "device-keys")
        return self.largest_union * self.shape.wire * (2 if ahead else 1)

    def row_gradients(self) -> int:
        """Bytes of row gradients on the device: one layer's in fp32 and as they leave; resident: those of a step."""
        s = self.shape
        if self.strategy == "resident":
            return 2 * s.layers * s.d * self.step_union * FP32
        return self.largest_union * (FP32 + s.gradient)

    def forward_temporaries(self) -> int:
        """Bytes of one layer's forward pass: x in fp32 for the router, logits, and the candidates of a token."""
        s, T = self.shape, self.work.tokens
        candidates = 0 if self.strategy == "host" else s.probed * -(-s.r // s.experts)
        return T * FP32 * (s.buffered + s.experts + candidates)

    def backward_temporaries(self) -> int:
        """Bytes of one layer's backward pass: activations, ds and ds c as [T, U], dp as [T, E], dx in fp32."""
        s, T = self.shape, self.work.tokens
        return T * (3 * s.base * self.work.union + FP32 * (s.experts + s.buffered))

    def device_bytes(self) -> dict[str, int]:
        """Bytes on the device by part, all layers; without the base model and its activations."""
        s, L = self.shape, self.shape.layers
        resident = self.strategy == "resident"
        return {
            "router": L * self.router(),
            "adapter": self.tables(),
            "optimizer": 2 * L * self.router() + (2 * s.values * s.moment if resident else 0),
            "gradients": L * self.router() + (self.row_gradients() if resident else 0),
            "saved rows": L * self.saved_rows(),
            "key buffers": self.key_buffers(),
            "buffers": self.row_buffers() + (0 if resident else self.row_gradients()),
            "activations": L * self.picks() + max(self.forward_temporaries(), self.backward_temporaries()),
        }

    # ------------------------------------------------------------------ host

    def host_bytes(self) -> dict[str, int]:
        """Bytes in host memory by part, all layers; what is page-locked says so."""
        s = self.shape
        if self.strategy == "resident":
            return {}
        wire, master = s.values * s.wire, s.values * s.master
        store = 2 * s.layers * s.d * self.step_union * FP32
        separate = s.wire < s.master
        return {
            "wire rows, page-locked": wire if separate else 0,
            "masters" if separate else "masters, page-locked": master,
            "moments": 2 * s.values * s.moment,
            "gradient store": store,
            "gradient store, kept for larger ones": store // 8,
            "gradient ring, page-locked": SLOTS * self.largest_union * s.gradient,
        }

    # ------------------------------------------------------------------ link

    def flows(self) -> list[Flow]:
        """What crosses for one layer: in each micro-batch, and once per optimizer step."""
        s, w = self.shape, self.work
        row, rows = s.d * w.union, self.union_values  # values of the value rows of U, of keys and values
        found: list[Flow] = []

        def add(what: str, to_device: bool, when: When, elements: int, each: int) -> None:
            found.append(Flow(what, to_device, when, elements, elements * each))

        if self.strategy == "resident":
            return []
        if self.strategy == "host":
            add("hidden states", False, "forward", w.tokens * s.d, s.base)
            add("router logits", False, "forward", w.tokens * s.experts, FP32)
            add("picks", True, "forward", 2 * w.tokens * s.top_k, ID)
            add("union ids", True, "forward", w.union, ID)
            add("key and value rows", True, "forward", rows, s.wire)
        if self.strategy == "stream":
            add("key table", True, "forward", s.r * s.d, s.wire)
        if self.strategy in ("stream", "device-keys"):
            add("value rows", True, "forward", row, s.wire)
        if w.rows == "refetch" and self.strategy in ("host", "stream"):
            add("key and value rows", True, "backward", rows, s.wire)
        if w.rows == "refetch" and self.strategy == "device-keys":
            add("value rows", True, "backward", row, s.wire)
        add("row gradients", False, "backward", rows, s.gradient)
        if self.strategy != "host":  # the host does not know U
            add("union ids", False, "backward", w.union, ID)
        if self.strategy == "device-keys":
            add("changed keys", True, "step", s.d * self.step_union, s.wire)
        if self.strategy == "device-rows":
            add("changed rows", True, "step", 2 * s.d * self.step_union, s.wire)
        return found

    def crossing(self, *, to_device: bool | None = None) -> int:
        """Bytes across the link per optimizer step, all layers: one way, or both."""
        return self.shape.layers * sum(
            flow.bytes * (1 if flow.when == "step" else self.work.accumulation)
            for flow in self.flows()
            if to_device is None or flow.to_device == to_device
        )

    def row_elements(self, *, step: bool = True) -> int:
        """Values of rows and their gradients that cross for one layer and micro-batch, both ways.

        Args:
            step: whether what crosses once per optimizer step is counted in, as at accumulation 1.
        """
        kinds = {"key and value rows", "key table", "value rows", "row gradients", "changed keys", "changed rows"}
        return sum(flow.elements for flow in self.flows() if flow.what in kinds and (step or flow.when != "step"))
