"""What each GPU of one machine holds, and how fast all are together: DDP, FSDP2, DeepSpeed's ZeRO-3.

Bounds, as all of the plan: each GPU has a link of its own, over which it also talks to the others; what a framework
allocates beside shards and the parameters that it gathers is not counted, but for DDP's buckets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from meft.cost.memory import FP32, Plan
from meft.cost.ranks import host_bytes_of_ranks, tokens_per_second
from meft.cost.step_time import BaseModel, Ceilings

PARALLEL = ("ddp", "fsdp2", "zero3")
_ZERO3_LIVE = 10**9  # parameters that DeepSpeed keeps gathered at most (stage3_max_live_parameters)


@dataclass(frozen=True)
class Units:
    """Stored bytes of a base model as sharding gathers them.

    Attributes:
        layer: of the largest layer.
        outside: of what is in no layer: embeddings, norms, the output layer.
        all: of everything; frozen weights and buffers.
    """

    layer: int
    outside: int
    all: int

    @classmethod
    def of(cls, base: Any, stored: Mapping[int, int]) -> Units:
        """Args: stored: bytes by a parameter's id, of those that are quantised."""

        def size(module: nn.Module) -> int:
            return sum(stored.get(id(p), p.numel() * p.element_size()) for p in module.parameters())

        lists = [module for module in base.modules() if isinstance(module, nn.ModuleList)]
        layers = [size(module) for module in max(lists, key=size, default=nn.ModuleList())]  # the decoder's
        total = size(base)
        return cls(max(layers, default=0), total - sum(layers), total)


@dataclass(frozen=True)
class HostOfRanks:
    """Bytes in host memory, and at most so many tokens a second of all ranks (None: no card was named).

    Attributes:
        each: part -> bytes of each rank.
        once: part -> bytes of all together.
    """

    each: dict[str, int]
    once: dict[str, int]
    tokens_per_second: float | None

    def node(self, ranks: int) -> int:
        """Bytes of all ranks."""
        return ranks * sum(self.each.values()) + sum(self.once.values())


@dataclass(frozen=True)
class RanksEstimate:
    """A plan for several GPUs of one machine; all of it is predicted.

    Attributes:
        device: part -> bytes of each rank at the peak.
        hosts: "a copy each", and for MEFT's rows in host memory "shared": one copy for all.
    """

    gpus: int
    parallel: str
    device: dict[str, int]
    hosts: dict[str, HostOfRanks] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """In bytes and tokens a second."""
        return {
            "gpus": self.gpus,
            "parallel": self.parallel,
            "device_bytes_per_rank": {**self.device, "peak": self.peak},
            "host": {
                name: {
                    "bytes_per_rank": host.each,
                    "bytes_once": host.once,
                    "bytes_of_node": host.node(self.gpus),
                    "tokens_per_second_at_most": host.tokens_per_second,
                }
                for name, host in self.hosts.items()
            },
        }

    @property
    def peak(self) -> int:
        """Bytes of each rank's device at the peak."""
        return sum(self.device.values())


def device_of_rank(
    parts: Mapping[str, int], units: Units, trainable: int, gpus: int, parallel: str, *, rows: bool = False
) -> dict[str, int]:
    """What each rank's device holds at the peak.

    Args:
        parts: of one process.
        trainable: values that the framework knows: not MEFT's rows.
        rows: whether the rest of what trains is MEFT's rows, which no framework shards.
    """
    device = dict(parts)
    if parallel == "ddp":
        device["ddp buckets"] = FP32 * trainable
        return device
    sharded = {part: device[part] for part in ("base", "router", "adapter", "optimizer", "gradients")}
    if rows:
        known = {"adapter": 0, "optimizer": 2 * FP32 * trainable, "gradients": FP32 * trainable}
        sharded |= {part: min(device[part], size) for part, size in known.items()}
    for part, size in sharded.items():
        device[part] += -(-size // gpus) - size
    if parallel == "fsdp2":  # the layer at work, the next one, and what is in no layer
        device["gathered"] = min(units.all, units.outside + 2 * units.layer)
    else:
        device["gathered"] = min(units.all, 2 * _ZERO3_LIVE)
    return device


def seconds_between_ranks(
    units: Units, trainable: int, gpus: int, parallel: str, ceilings: Ceilings, accumulation: int
) -> float:
    """At least so many seconds of a step for what the ranks send each other."""
    sent = 2 * FP32 * trainable
    if parallel != "ddp":  # weights are gathered for the forward pass, and again for the backward pass
        sent += 2 * accumulation * units.all
    return sent * (gpus - 1) / gpus / ceilings.to_device


def rows_of_ranks(
    plan: Plan,
    base: BaseModel,
    ceilings: Ceilings | None,
    gpus: int,
    least: float,
    *,
    clipping: bool,
    checkpointing: bool,
) -> dict[str, HostOfRanks]:
    """MEFT's rows in host memory: a copy each, and shared.

    Args:
        least: seconds of a step for what else the ranks do.
    """
    found = {}
    for name, shared in (("a copy each", False), ("shared", True)):
        each, once = host_bytes_of_ranks(plan, gpus, shared=shared)
        speed = None
        if ceilings is not None:
            most = tokens_per_second(
                plan, base, ceilings, gpus, shared=shared, clipping=clipping, checkpointing=checkpointing
            )
            tokens = gpus * plan.work.accumulation * plan.work.tokens
            speed = min(most, tokens / least) if least else most
        found[name] = HostOfRanks(each, once, speed)
        if not each:
            return {"a copy each": found[name]}
    return found
