"""`retrieval="auto"`: which strategy, from what fits into the device's memory and what a step takes on this machine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ..config import MEFTConfig
from .calibration import Calibration, calibrated
from .fit import by_size, strategies_that_fit
from .memory import AdapterShape, Plan, Rows, Work
from .step_time import BaseModel, step_time

logger = logging.getLogger(__name__)

UNION_SHARES = (0.1, 0.26, 0.6, 1.0)  # of r: which one comes is up to the data
ACCUMULATIONS = (1, 16)


@dataclass(frozen=True)
class ModelProfile:
    """What of the model an engine has to know to choose.

    Attributes:
        base: the frozen model; its `length` is that of one sequence.
        activations: tokens of a micro-batch -> bytes that its activations take.
    """

    base: BaseModel
    activations: Callable[[int], int]


def decoder_shape(
    model: nn.Module, ffns: Sequence[nn.Module], own: Callable[[nn.Module], bool], length: int, weight_bytes: float
) -> BaseModel:
    """What the step-time model asks for; layers without an adapter are shared out among those with one.

    Args:
        model: a transformers model. ffns: its adapted FFNs without their adapters, at least one.
        own: whether a module is an adapter's, which does not count.
        weight_bytes: of a weight as it is stored.
    """
    config = _text_config(model)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    used = min(1.0, (getattr(config, "num_experts_per_tok", None) or experts) / experts)
    heads, d = getattr(config, "num_attention_heads", None) or 1, getattr(config, "hidden_size", None) or 1
    ends = [getattr(model, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings")]
    apart = {id(m) for ffn in ffns for m in ffn.modules()} | {id(m) for m in ends}
    rest = sum(_weights(m) for m in model.modules() if id(m) not in apart and not own(m))
    ffn = sum(_weights(m) for module in ffns for m in module.modules())
    attended = heads * (getattr(config, "head_dim", None) or d // heads)
    head = _weights(ends[1]) if ends[1] is not None else 0
    return BaseModel(length, rest // len(ffns), int(ffn * used) // len(ffns), attended, head, weight_bytes)


def model_profile(model: nn.Module, ffns: Sequence[nn.Module], own: Callable[[nn.Module], bool]) -> ModelProfile:
    """Of a transformers model; arguments as in `decoder_shape`."""
    frozen = [p for ffn in ffns for p in ffn.parameters()]
    itemsize = min((p.element_size() for p in frozen if p.is_floating_point()), default=2)
    packed = any(not p.is_floating_point() for p in frozen)
    base = decoder_shape(model, ffns, own, 512, 0.52 if packed else itemsize)
    layers, d = len(ffns), getattr(_text_config(model), "hidden_size", None) or 1
    vocabulary = base.head // d

    def activations(tokens: int) -> int:
        saved = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        # A layer keeps about 34 bytes a token and hidden unit at 2 bytes a value (arXiv 2205.05198, eq. 1, without
        # attention scores), or its input alone; logits are kept in the model's dtype and in float32, with a gradient.
        layer = 17 * tokens * d * itemsize
        return (layers * tokens * d * itemsize + layer if saved else layers * layer) + tokens * vocabulary * 10

    return ModelProfile(base, activations)


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _weights(module: nn.Module) -> int:
    """Of a module itself; a packed weight has fewer elements than it stands for."""
    width = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(width[0], int) and isinstance(width[1], int):
        return width[0] * width[1]
    return sum(p.numel() for p in module.parameters(recurse=False))


def free_bytes(device: torch.device) -> int:
    """What can still be allocated on a CUDA device, a limit of torch's allocator included."""
    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    limit = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return min(free + reserved - allocated, limit - allocated)


def left_at_peak(device: torch.device) -> int:
    """Bytes of a CUDA device that were free when most of it was allocated, but for a twentieth; 0 of other devices."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.memory_reserved(device)
    limit = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return max(0, min(free + reserved - peak, limit - peak) - total // 20)


def choose(
    config: MEFTConfig, widths: Sequence[int], x: Tensor, profile: ModelProfile | None, free: int,
    calibration: Calibration | None,
) -> Plan:  # fmt: skip
    """The plan of an adapter whose rows are in host memory.

    Of those that fit at the largest union that can be, the one with the least mean time of a step over `UNION_SHARES`
    and `ACCUMULATIONS`, with the link as fast as it is while the optimizer's threads run. Without a calibration the
    one that moves least, and if none fits the one that takes least.

    Args:
        widths: the hidden size of each of the adapter's layers.
        x: [T, d], the input of a layer in the first pass.
        free: bytes that can still be allocated on the device.
    """
    T = len(x)
    shape = AdapterShape.of_layers(config, widths, base_dtype=x.dtype)
    work = Work(tokens=T, union=min(config.r, T * config.top_k))
    if profile is not None:
        free -= profile.activations(T)
    kept: tuple[Rows, ...] = ("save", "refetch") if config.backward_rows == "auto" else (config.backward_rows,)  # type: ignore[assignment]
    plans = strategies_that_fit(shape, work, free, rows=kept, device_rows=config.device_rows)
    if not plans:
        least = by_size(shape, Work(T, work.union, rows=kept[-1]))[-1]
        logger.warning(
            "MEFT: no retrieval strategy fits into the %.2f GiB that are left on the device; the smallest, '%s', "
            "takes %.2f GiB: use a smaller batch or r.",
            free / 2**30, least.strategy, sum(least.device_bytes().values()) / 2**30,
        )  # fmt: skip
        return least
    if calibration is None or profile is None:
        return plans[0]
    ceilings = calibration.contended

    def seconds(plan: Plan) -> float:
        times = []
        for share in UNION_SHARES:
            for accumulation in ACCUMULATIONS:
                union = max(1, min(work.union, round(share * config.r)))
                now = replace(plan, work=Work(T, union, accumulation, plan.work.rows))
                times.append(step_time(now, profile.base, ceilings).seconds / accumulation)
        return fmean(times)

    return min(plans, key=seconds)


def chosen(config: MEFTConfig, widths: Sequence[int], x: Tensor, profile: ModelProfile | None) -> Plan:
    """The plan for inputs like x [T, d] on their CUDA device, by the memory that is free now; says what was chosen."""
    free = free_bytes(x.device)
    plan = choose(config, widths, x, profile, free, _calibration(x.device))
    logger.info(
        "MEFT: retrieval='%s', backward_rows='%s' (%.2f of %.2f GiB left on the device, %d tokens).",
        plan.strategy, plan.work.rows, sum(plan.device_bytes().values()) / 2**30, free / 2**30, len(x),
    )  # fmt: skip
    return plan


def _calibration(device: torch.device) -> Calibration | None:
    try:
        return calibrated(device)
    except torch.OutOfMemoryError:
        logger.warning(
            "MEFT: the device has no memory left to be measured in; retrieval='auto' goes by what fits and moves least."
        )
        return None
