"""The least time that a training step with MEFT can take, from the ceilings of a machine.

A step is simulated on four resources: the device's compute stream, the link to the device, the link to the host, and
the host's memory and cores. Each does one thing at a time at its ceiling. What layer l of a micro-batch waits for:

    stream        keys of l are copied ahead into one of two buffers, free once layer l - 2 has picked; picking waits
    all           values (host: all rows of U) are gathered once l has picked, under the base FFN of l alone
    host          before that, hidden states go down, and the host scores them
    refetch       rows for the backward pass of l are gathered during that of l + 1
    backward      row gradients of l leave under all that is below it, and are added up in the host's store
    hot rows      what has a place on the device crosses no link and is updated there, before its layer's forward pass
    update        clipping: after the norm of all gradients, layer 0 first; else once a layer's gradients of the last
                  micro-batch are stored. Device tables then get the changed rows. The next forward pass of l waits.

Work that is needed sooner goes first and later work fills the gaps, so nothing better can be scheduled by a machine
that has these ceilings and computes what the kernels of `adapter_kernels` do (products over all of U). Not counted, so
that the result stays a bound: launches, allocation, norms and activation functions, and that copies take a share of
the host's memory bandwidth.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

from .host_bytes import HostBytes
from .memory import FP32, Flow, Plan

_STEPS, _COUNTED = 5, 2  # simulated optimizer steps, and those at the end that are averaged: a steady state


@dataclass(frozen=True)
class Ceilings:
    """What a machine reaches at most; all above 0, math.inf is allowed.

    Attributes:
        flops: flop/s of a bf16 GEMM on the device.
        device_bytes: bytes/s of the device's memory.
        to_device, to_host: bytes/s over the link in one direction alone.
        both_ways: bytes/s over the link, the sum of both directions when both are busy.
        host_bytes: bytes/s of host memory that the row optimizer reaches.
        host_flops: flop/s at which the host picks; keys are read no faster than `host_bytes`.
    """

    flops: float
    device_bytes: float
    to_device: float
    to_host: float
    both_ways: float
    host_bytes: float
    host_flops: float


@dataclass(frozen=True)
class BaseModel:
    """A frozen decoder, whose weights get no gradients.

    Attributes:
        length: tokens of a sequence, which attend to those before them.
        attention, ffn: weights of a layer's projections, and of its FFN that one token uses.
        attended: width of the queries, heads x head size.
        head: weights of the output layer, vocabulary x d.
        weight_bytes: bytes of a weight in memory (bf16: 2, NF4: 0.52).
    """

    length: int
    attention: int
    ffn: int
    attended: int
    head: int
    weight_bytes: float = 2.0


@dataclass(frozen=True)
class StepTime:
    """The bound of an optimizer step.

    Attributes:
        seconds: the bound.
        busy: resource -> seconds of work in it.
        tokens_per_second: tokens of all micro-batches over `seconds`.
    """

    seconds: float
    busy: dict[str, float]
    tokens_per_second: float

    @property
    def share_of_compute(self) -> float:
        """Speed relative to the same step where nothing moves and the host does nothing, at most 1."""
        return self.busy["compute"] / self.seconds


class _Resource:
    """Does one thing at a time; what is given first has precedence, what comes later fills the gaps, in pieces."""

    def __init__(self) -> None:
        self.starts, self.ends = [0.0], [math.inf]  # of the gaps
        self.busy = 0.0

    def run(self, seconds: float, *after: float) -> float:
        """When work that may begin at the latest of `after` is done."""
        now, left = max(after, default=0.0), seconds
        if not seconds:
            return now
        self.busy += seconds
        if now > self.starts[-1]:  # it leaves a gap before it
            self.ends[-1] = now
            self.starts.append(now)
            self.ends.append(math.inf)
        if now == self.starts[-1]:  # after all that was given, as most often
            self.starts[-1] = now + seconds
            return self.starts[-1]
        i = bisect_right(self.ends, now)
        while left > 0:
            start, end = self.starts[i], self.ends[i]
            now = max(now, start)
            done = min(now + left, end)
            left = 0.0 if done < end else left - (end - now)
            pieces = [(a, b) for a, b in ((start, now), (done, end)) if a < b]
            self.starts[i : i + 1], self.ends[i : i + 1] = [a for a, _ in pieces], [b for _, b in pieces]
            i += len(pieces) if left > 0 else 0
            now = done
        return now


class _Seconds:
    """How long each part of a layer takes by itself."""

    def __init__(self, plan: Plan, base: BaseModel, at: Ceilings, host: HostBytes) -> None:
        s, w = plan.shape, plan.work
        self.plan, self.at = plan, at
        T, U, d, compute = w.tokens, w.union, s.d, s.compute
        candidates = s.probed * (s.r / s.experts)
        attending = 2 * T * base.length * base.attended  # half of the pairs: causal
        key_rows = min(s.r, T * candidates) * d * compute
        on_host = plan.way.selects_on_host
        self.attention = self._device(2 * T * base.attention + attending, base.attention * base.weight_bytes)
        self.ffn = self._device(2 * T * base.ffn, base.ffn * base.weight_bytes)
        # Flash attention makes five products backward where it makes two forward.
        below = 2 * T * (base.attention + base.ffn) + 2.5 * attending
        self.below = self._device(below, (base.attention + base.ffn) * base.weight_bytes)
        self.head = 2 * self._device(2 * T * base.head, base.head * base.weight_bytes)
        self.router = self._device(2 * T * s.experts * d, FP32 * s.experts * d)
        self.router_backward = self._device(4 * T * s.experts * d, 2 * FP32 * s.experts * d)
        self.scoring = 0.0 if on_host else self._device(2 * T * candidates * d, key_rows)
        self.sparse = self._device(4 * T * U * d, 2 * U * d * compute)
        self.sparse_backward = self._device(10 * T * U * d, 2 * U * d * (compute + s.gradient))
        self.router_update = s.layers * 7 * plan.router() / at.device_bytes
        host_scoring = max(2 * T * candidates * d / at.host_flops, key_rows / at.host_bytes)
        self.host_scoring = host_scoring if on_host else 0.0
        self.host = host
        stay = plan.way.updates_on_device
        self.update = 0.0 if stay else self.host.updated() / at.host_bytes
        hot = plan.hot_rows.tables * plan.hot_rows.stepped(s, w) if plan.hot else 0.0
        self.device_update = (self.host.updated() if stay else self.host.of_rows(hot)) / at.device_bytes
        self.norm = self.host.looked_at() / at.host_bytes

    def _device(self, flops: float, read: float) -> float:
        return max(flops / self.at.flops, read / self.at.device_bytes)

    def stored(self, micro_batch: int) -> float:
        """Adding one layer's row gradients to the host's store."""
        return self.host.drained(micro_batch) / self.at.host_bytes

    def flows(self, when: str, to_device: bool, ahead: bool | None = None) -> float:
        """Moving what one layer moves: of what can cross before the picks are known (ahead) alone, or all but it."""

        def meant(flow: Flow) -> bool:
            return ahead is None or flow.ahead == ahead

        moved = sum(f.bytes for f in self.plan.flows() if f.when == when and f.to_device == to_device and meant(f))
        return moved / (self.at.to_device if to_device else self.at.to_host)


def step_time(
    plan: Plan,
    base: BaseModel,
    ceilings: Ceilings,
    *,
    clipping: bool = True,
    checkpointing: bool = True,
    moved: HostBytes | None = None,
) -> StepTime:
    """The least seconds of an optimizer step among many alike.

    Args:
        clipping: whether gradients are clipped by their global norm, which no update can precede.
        checkpointing: whether each layer is computed again in the backward pass.
        moved: by the host; None: what it moves for one process.
    """
    seconds, L = _Seconds(plan, base, ceilings, moved or HostBytes(plan.on_host())), plan.shape.layers
    compute, up, down, host = resources = [_Resource() for _ in range(4)]
    table, rows = seconds.flows("forward", True, True), seconds.flows("forward", True, False)
    hidden, again = seconds.flows("forward", False), seconds.flows("backward", True)
    leaving, changed = seconds.flows("backward", False), seconds.flows("step", True)
    due, ready = [0.0] * L, [0.0] * L
    free = [0.0, 0.0]  # when the last two picks had read their key buffers: the older one's buffer comes next
    t, ends, before = 0.0, [], [0.0] * 4

    def forward(layer: int, t: float) -> float:
        copied = up.run(table, ready[layer], free.pop(0))
        t = compute.run(seconds.attention + seconds.router, t)
        if plan.way.selects_on_host:
            picked = host.run(seconds.host_scoring, down.run(hidden, t), ready[layer])
        else:
            picked = t = compute.run(seconds.scoring, t, copied, ready[layer])
        free.append(picked)
        arrived = up.run(rows, picked)
        return compute.run(seconds.sparse, compute.run(seconds.ffn, t), arrived)

    for step in range(_STEPS):
        if step == 1:  # no update comes before the first step
            before = [resource.busy for resource in resources]
        if step:
            t = compute.run(seconds.router_update, t, *(due if clipping else ()))
        for micro_batch in range(plan.work.accumulation):
            for layer in range(L):
                if step and not micro_batch:
                    t = compute.run(seconds.device_update, t)
                    ready[layer] = up.run(changed, host.run(seconds.update, due[layer]))
                t = forward(layer, t)
            asked, t = t, compute.run(seconds.head, t)
            for layer in reversed(range(L)):
                fetched = up.run(again, asked)
                asked = t
                if checkpointing:
                    t = compute.run(seconds.attention + seconds.ffn, t)
                    t = compute.run(seconds.sparse, t, fetched)
                t = compute.run(seconds.sparse_backward, t, fetched)
                due[layer] = host.run(seconds.stored(micro_batch), down.run(leaving, t))
                t = compute.run(seconds.below + seconds.router_backward, t)
        due = [host.run(L * seconds.norm, t, *due)] * L if clipping else [host.run(seconds.norm, each) for each in due]
        ends.append(t)

    names = ("compute", "to device", "to host", "host")
    busy = {n: (r.busy - b) / (_STEPS - 1) for n, r, b in zip(names, resources, before, strict=True)}
    both = plan.crossing() / ceilings.both_ways
    least = max((ends[-1] - ends[-1 - _COUNTED]) / _COUNTED, *busy.values(), both)
    return StepTime(least, busy, plan.work.accumulation * plan.work.tokens / least)
