"""The plan of a run: memory by a trace, traffic by arithmetic, seconds by ceilings, and what would fit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from aslora_meft.adapter import check_targets
from aslora_meft.errors import UsageError
from aslora_meft.planner.base import build_base, compute_dtype, config_dtype, load_config
from aslora_meft.planner.methods import adapt, method_config
from aslora_meft.planner.neurons import PlannedFFN, lasting_bytes
from aslora_meft.planner.quantised import QUANTISED, quantise
from aslora_meft.planner.ranks import (
    HostOfRanks,
    RanksEstimate,
    Units,
    device_of_rank,
    rows_of_ranks,
    seconds_between_ranks,
)
from aslora_meft.planner.rates import GIB, ceilings
from aslora_meft.planner.request import RESERVED, Estimate, Request
from aslora_meft.planner.trace import Extra, Memory, Step, trace_step
from meft.cost.auto import decoder_shape
from meft.cost.fit import by_size, largest_that_fits, strategies_that_fit, with_hot_rows
from meft.cost.host_memory import narrower
from meft.cost.memory import AdapterShape, Plan, Rows, Work
from meft.cost.step_time import BaseModel, StepTime, step_time
from meft.retrieval.strategies import UNKNOWN_DEVICE, strategy_name


class _Model:
    """The adapted model of a request, for any batch and length."""

    def __init__(self, request: Request, config: Any) -> None:
        self.request = request
        self.dtype = request.weights or config_dtype(config)
        self.base: PreTrainedModel = build_base(copy.deepcopy(config), self.dtype)
        self.weights = sum(p.numel() for p in self.base.parameters())
        quantised = quantise(self.base, self.dtype) if self.dtype in QUANTISED else {}
        self.stored = quantised
        self.weight_bytes = sum(
            quantised.get(id(p), p.numel() * p.element_size()) for p in self.base.parameters()
        ) / max(1, self.weights)
        self.config: Any = method_config(request.method, request.adapter)
        check_targets(self.base, self.config)
        self.model: PeftModel = adapt(self.base, self.config, request.method)

    @cached_property
    def neurons(self) -> dict[str, Any]:
        """Path in the base model -> adapted FFN."""
        tuner: Any = self.model.base_model
        return dict(tuner.adapted_ffns())

    @cached_property
    def shape(self) -> AdapterShape:
        """Of the adapter as asked."""
        return self.shape_of(self.request)

    def narrower(self, plan: Plan) -> dict[str, int]:
        """Bytes of host memory with narrower masters and moments."""
        kept = {text: replace(plan, shape=self._shape_of(config)) for text, config in narrower(self.config).items()}
        return {text: sum(other.host_bytes().values()) for text, other in kept.items()}

    def shape_of(self, request: Request) -> AdapterShape:
        """Of the adapter of another request, on the same FFNs."""
        same = request.adapter == self.request.adapter
        return self._shape_of(self.config if same else method_config("meft", request.adapter))

    def _shape_of(self, config: Any) -> AdapterShape:
        widths = [layer.in_features for layer in self.neurons.values()]
        return AdapterShape.of_layers(config, widths, base_dtype=compute_dtype(self.dtype))

    def work(self, request: Request, shape: AdapterShape | None = None) -> Work:
        """The step's sizes; a micro-batch cannot use more neurons than its tokens keep."""
        shape = shape or self.shape
        union = min(round(request.union_share * shape.r), request.micro_batch * shape.top_k)
        return Work(request.micro_batch, max(1, union), request.gradient_accumulation_steps, self.kept_rows[0])

    @property
    def kept_rows(self) -> tuple[Rows, ...]:
        """What may happen with the rows for backward, the preferred one first."""
        asked: Any = self.config.backward_rows
        return ("save", "refetch") if asked == "auto" else (asked,)

    def trace(self, request: Request, plan: Plan | None) -> Memory:
        step = Step(
            request.per_device_train_batch_size,
            request.max_length,
            request.gradient_accumulation_steps,
            request.optim,
            request.gradient_checkpointing,
        )
        extra = Extra(weights=self.stored)
        if plan is not None:
            base: Any = self.model.base_model
            for path, layer in self.neurons.items():
                base.model.get_submodule(path).call.end()
                base.model.set_submodule(path, PlannedFFN(layer.base_layer, plan, layer.in_features, layer.call.up))
            extra.lasting = lasting_bytes(plan)
        return trace_step(self.model, step, request.method, extra)

    def beside(self, request: Request) -> int:
        """Bytes of base model and activations at the peak, without what MEFT adds, from a plan of the smallest MEFT."""
        tiny = replace(self.shape, r=1, experts=1, probed=1, top_k=1)
        least = by_size(tiny, replace(self.work(request), union=1))[-1]
        return self.trace(request, least).peak - sum(least.device_bytes().values())

    def candidates(self, request: Request) -> list[Plan]:
        """Plans for MEFT, the preferred one first; at least one, the last ones with the least memory."""
        strategy, work, hot = self.strategy, self.work(request), self.device_rows(request)
        if request.gpu is None:
            return [with_hot_rows(Plan(self.shape, work, UNKNOWN_DEVICE if strategy == "auto" else strategy), hot)]
        free = request.gpu - RESERVED - self.beside(request)
        asked = {"placement": self.config.placement, "rows": self.kept_rows, "device_rows": hot}
        found = strategies_that_fit(self.shape, work, free, **asked)
        # The plan's arithmetic adds up what is not live at one time: what it finds too large may fit.
        least = replace(work, rows=self.kept_rows[-1])
        last = by_size(self.shape, least)[-2:] if strategy == "auto" else [Plan(self.shape, least, strategy)]
        return [p for p in found if strategy in ("auto", p.strategy)] + [with_hot_rows(p, hot) for p in last]

    def device_rows(self, request: Request) -> float | str:
        """As of `MEFTConfig`; 0 on several GPUs, where rows that they share get no places."""
        return self.config.device_rows if request.gpus == 1 else 0

    @property
    def strategy(self) -> str:
        """MEFT's retrieval, or 'auto'."""
        return strategy_name(self.config, torch.device("cuda")) or "auto"

    def speed(self, request: Request) -> BaseModel:
        ffns = [layer.base_layer for layer in self.neurons.values()]
        return decoder_shape(self.base, ffns, lambda module: False, request.max_length, self.weight_bytes)


def estimate(request: Request) -> Estimate:
    """Plan a run.

    Raises:
        UsageError: a model, method or value that cannot be planned.
    """
    config = load_config(request.model, trust_remote_code=request.trust_remote_code)
    model = _Model(request, config)
    plan, memory = _best(model, request)
    host = plan.host_bytes() if plan is not None else {}
    if memory.paged:
        host = {**host, "paged optimizer states": memory.paged}
    seconds, computing = _seconds(model, request, plan, memory)
    narrow = model.narrower(plan) if plan is not None and host else {}
    found = Estimate(request, model.weights, memory, plan, host, seconds, computing, model.dtype, narrower=narrow)
    if request.gpus > 1:
        found = replace(found, ranks=_ranks(model, found))
    if found.fits is not False:
        return found
    return replace(found, largest=_largest(model, config, request), remedies=_remedies(config, request))


def _best(model: _Model, request: Request) -> tuple[Plan | None, Memory]:
    """The first plan whose trace fits, else the last one."""
    if request.method != "meft":
        return None, model.trace(request, None)
    for plan in model.candidates(request):
        memory = model.trace(request, plan)
        if request.gpu is None or _peak(model, request, memory) <= request.gpu - RESERVED:
            break
    if request.gpu is not None and model.device_rows(request) == "auto":
        plan = with_hot_rows(plan, "auto", request.gpu - RESERVED - memory.peak - request.gpu // 20)
        memory = model.trace(request, plan)
    return plan, memory


def _device_of_rank(model: _Model, request: Request, memory: Memory) -> dict[str, int]:
    units = Units.of(model.base, model.stored)
    rows = request.method == "meft"
    return device_of_rank(memory.parts, units, memory.trainable, request.gpus, request.parallel, rows=rows)


def _peak(model: _Model, request: Request, memory: Memory) -> int:
    """Bytes that each device holds."""
    return memory.peak if request.gpus == 1 else sum(_device_of_rank(model, request, memory).values())


def _seconds(
    model: _Model, request: Request, plan: Plan | None, memory: Memory
) -> tuple[float, float] | tuple[None, None]:
    """At least so many seconds per optimizer step, and so many of computing."""
    if request.card is None:
        return None, None
    at = ceilings(request.card)
    if plan is not None:
        time: StepTime = step_time(
            plan,
            model.speed(request),
            at,
            clipping=request.max_grad_norm > 0,
            checkpointing=request.gradient_checkpointing,
        )
        return time.seconds, time.busy["compute"]
    passes = 3 if request.gradient_checkpointing else 2
    read = passes * model.weights * model.weight_bytes
    update = 28 * memory.trainable / at.device_bytes  # AdamW in fp32 reads and writes 28 bytes a value
    each = max(memory.flops / at.flops, read / at.device_bytes)
    seconds = request.gradient_accumulation_steps * each + update
    return seconds, seconds


def _ranks(model: _Model, one: Estimate) -> RanksEstimate:
    """Several GPUs, of which each does what `one` says."""
    request, plan, units = one.request, one.plan, Units.of(model.base, model.stored)
    layout = request.gpus, request.parallel
    at = ceilings(request.card) if one.seconds is not None and request.card is not None else None
    least = 0.0
    if at is not None:
        least = seconds_between_ranks(units, one.memory.trainable, *layout, at, request.gradient_accumulation_steps)
    if plan is not None and not plan.way.updates_on_device:
        hosts = rows_of_ranks(
            plan, model.speed(request), at, request.gpus, least,
            clipping=request.max_grad_norm > 0, checkpointing=request.gradient_checkpointing,
        )  # fmt: skip
    else:
        tokens = request.gpus * request.gradient_accumulation_steps * request.micro_batch
        speed = None if one.seconds is None else tokens / max(one.seconds, least)
        hosts = {"a copy each": HostOfRanks(one.host, {}, speed)}
    return RanksEstimate(*layout, _device_of_rank(model, request, one.memory), hosts)


def _remedies(config: Any, request: Request) -> tuple[str, ...]:
    """Options that make a run fit: single ones, or else all of them together, with shorter rows if need be."""
    assert request.gpu is not None
    room = request.gpu - RESERVED
    changes: dict[str, dict[str, Any]] = {}
    if not request.gradient_checkpointing:
        changes["--gradient_checkpointing true"] = {"gradient_checkpointing": True}
    if (request.weights or config_dtype(config)) not in QUANTISED:
        changes["--load_in_4bit true"] = {"weights": "nf4"}
    if request.method == "meft" and request.adapter.get("retrieval", "auto") != "auto":
        changes["--retrieval auto"] = {"adapter": {**request.adapter, "retrieval": "auto"}}
    if request.method == "meft" and request.adapter.get("placement") == "device":
        changes["--placement host"] = {"adapter": {**request.adapter, "placement": "host"}}

    def peak(change: dict[str, Any]) -> float:
        changed = replace(request, **change)
        try:
            other = _Model(changed, config)
            return _peak(other, changed, _best(other, changed)[1])
        except UsageError:  # such as a model without linear layers to quantise
            return math.inf

    single = tuple(option for option, change in changes.items() if peak(change) <= room)
    if single:
        return single
    if request.per_device_train_batch_size > 1:
        changes["--per_device_train_batch_size 1"] = {"per_device_train_batch_size": 1}
    together = {name: value for change in changes.values() for name, value in change.items()}
    length, options = request.max_length, " ".join(changes)
    while length >= 64 and peak({**together, "max_length": length}) > room:
        length //= 2
    if length >= 64:
        return (f"{options} --max_length {length}" if length < request.max_length else options,)
    least = (peak({**together, "max_length": 64}) + RESERVED) / GIB
    return (f"a device of at least {least:.1f} GiB, with {options} --max_length 64",) if least < math.inf else ()


def _largest(model: _Model, config: Any, request: Request) -> dict[str, int]:
    """The largest r, batch and length that fit, each with the others as asked."""
    assert request.gpu is not None
    room = request.gpu - RESERVED

    def small_enough(changed: Request) -> bool:
        if request.method != "meft":
            adapted = model if changed.adapter == request.adapter else _Model(changed, config)
            return _peak(adapted, changed, adapted.trace(changed, None)) <= room
        shape = model.shape_of(changed)
        work = replace(model.work(changed, shape), rows=model.kept_rows[-1])
        plan = by_size(shape, work)[-1] if model.strategy == "auto" else Plan(shape, work, model.strategy)
        return _peak(model, changed, model.trace(changed, plan)) <= room

    def largest(limit: int, step: int, changed: Callable[[int], Request]) -> int:
        return largest_that_fits(lambda n: small_enough(changed(n)), limit, step)

    found, r = {}, getattr(model.config, "r", None)
    if isinstance(r, int):
        step = 1
        if request.method == "meft":  # whole experts, in multiples of what a token keeps, coarser where there are many
            whole = math.lcm(model.config.top_k, request.adapter.get("num_experts") or 1)
            step = whole * max(1, model.config.top_k * max(1, r // 4096) // whole)
        found["r"] = largest(r, step, lambda n: replace(request, adapter={**request.adapter, "r": n}))
    batch, length = request.per_device_train_batch_size, request.max_length
    found["per_device_train_batch_size"] = largest(batch, 1, lambda n: replace(request, per_device_train_batch_size=n))
    found["max_length"] = largest(length, max(1, length // 16), lambda n: replace(request, max_length=n))
    return found
