"""The terms in which a strategy says what it costs: an adapter's sizes, the work of a step, what crosses the link.

d is the hidden size, r the neurons of a layer, T the tokens of a micro-batch, U its union: the distinct neurons that
its tokens picked in one layer. A row is d values, one neuron's key or value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from adapter_kernels.adamw.moment_layout import moment_bytes

from ..config import MEFTConfig

ID = 4  # bytes of the int32 of a neuron or a place
FP32 = 4
When = Literal["forward", "backward", "step"]
Rows = Literal["save", "refetch"]
OfRows = Literal["", "table", "union", "step"]


@dataclass(frozen=True)
class AdapterShape:
    """The sizes of an adapter.

    Attributes:
        d: hidden size; where layers have several, their mean, rounded up.
        layers: adapted FFNs.
        r, experts, probed, top_k: of `MEFTConfig`, per layer; probed and top_k per token.
        compute, master, base, gradient: bytes of a value of the rows as they are read, of the masters, of the hidden
            states, and of row gradients on their way to the host.
        mode: how moments are kept, see `adapter_kernels.adamw.moment_layout`.
        widest: the largest hidden size of a layer, which buffers are for; 0: d.
    """

    d: int
    layers: int
    r: int
    experts: int
    probed: int
    top_k: int
    compute: int = 2
    master: int = 4
    base: int = 2
    gradient: int = 2
    mode: str = "float32"
    widest: int = 0

    @classmethod
    def of(cls, config: MEFTConfig, *, d: int, layers: int, base_dtype: torch.dtype) -> AdapterShape:
        """The sizes of a configuration; base_dtype is the dtype of the hidden states (bfloat16 for an NF4 base)."""
        master = getattr(torch, config.master_dtype).itemsize
        own = base_dtype if config.row_dtype == "auto" else getattr(torch, config.row_dtype)
        compute = min(own.itemsize, master)
        narrow = own == base_dtype == torch.bfloat16 and config.gradient_dtype == "auto"
        return cls(
            d, layers, config.r, config.experts, config.probed, config.top_k, compute, master,
            base_dtype.itemsize, compute if narrow else max(FP32, compute), config.row_rule.moments,
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
    def row_moments(self) -> int:
        """Bytes of the moments of one row."""
        return moment_bytes(self.mode, self.d, torch.float64 if self.master == 8 else torch.float32)

    @property
    def moments(self) -> int:
        """Bytes of the moments of all keys and values."""
        return 2 * self.layers * self.r * self.row_moments

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

    def touched(self, shape: AdapterShape) -> int:
        """Distinct neurons of a layer that an optimizer step updates."""
        return min(shape.r, self.accumulation * self.union) if self.step_union is None else self.step_union


@dataclass(frozen=True)
class Flow:
    """One thing that crosses the link, of one layer.

    Attributes:
        what: its name.
        to_device: its direction.
        when: 'forward' and 'backward' of each micro-batch, or 'step': once per optimizer step.
        elements, bytes: its size.
        ahead: whether it can cross before anybody knows the picks.
        rows: which rows it has: of whole tables, of the union of a micro-batch, of that of a step; none.
    """

    what: str
    to_device: bool
    when: When
    elements: int
    bytes: int
    ahead: bool = False
    rows: OfRows = ""


def to_device(what: str, when: When, elements: int, each: int, *, ahead: bool = False, rows: OfRows = "") -> Flow:
    """A flow of elements of `each` bytes to the device."""
    return Flow(what, True, when, elements, elements * each, ahead, rows)


def to_host(what: str, when: When, elements: int, each: int, *, rows: OfRows = "") -> Flow:
    """A flow of elements of `each` bytes to the host."""
    return Flow(what, False, when, elements, elements * each, rows=rows)


def gradients_to_host(shape: AdapterShape, work: Work, *, ids: bool) -> Iterator[Flow]:
    """The row gradients of a layer.

    Args:
        ids: whether the neurons of U, which the device has picked, cross too.
    """
    yield to_host("row gradients", "backward", 2 * shape.d * work.union, shape.gradient, rows="union")
    if ids:
        yield to_host("union ids", "backward", work.union, ID)
