"""One training step, traced on the meta device: the peak of live bytes, part by part."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from aslora_meft.planner.live import MemoryTracker
from aslora_meft.planner.methods import TASK_IDS, untraceable
from aslora_meft.planner.optimizer_state import StateBytes, state_bytes


@dataclass(frozen=True)
class Step:
    """What a step is made of: micro-batches of [batch, length] tokens without padding.

    Attributes:
        optimizer: one of `optimizer_state.OPTIMIZERS`.
        checkpointing: whether each layer is computed again in the backward pass.
    """

    batch: int
    length: int
    accumulation: int = 1
    optimizer: str = "adamw_torch_fused"
    checkpointing: bool = True


@dataclass(frozen=True)
class Memory:
    """What a step takes on the device.

    Attributes:
        parts: part -> bytes at the peak, which is their sum.
        trainable: values that the optimizer updates.
        flops: of one micro-batch, forward and backward.
        paged: bytes of optimizer states that are paged between host and device.
    """

    parts: dict[str, int]
    trainable: int
    flops: int
    paged: int = 0

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())


@dataclass
class Extra:
    """What the trace cannot see by itself.

    Attributes:
        lasting: part -> bytes that are there through the whole step.
        weights: id of a frozen weight -> the bytes that it stands for, where these are not its own.
    """

    lasting: dict[str, int] = field(default_factory=dict)
    weights: dict[int, int] = field(default_factory=dict)


def trace_step(model: nn.Module, step: Step, method: str, extra: Extra | None = None) -> Memory:
    """Trace the second step of a run: optimizer states are there, gradients are made and, if accumulated, kept.

    The optimizer's own arithmetic allocates nothing: torch's and bitsandbytes' fused kernels work in place.

    Args:
        model: a PEFT model on the meta device, in any mode.

    Raises:
        UsageError: the method's forward or backward pass looks at values.
    """
    extra = extra or Extra()
    live = MemoryTracker()
    states = StateBytes(0, 0)
    trainable = [p for p in model.parameters() if p.requires_grad]
    for name, parameter in model.named_parameters():
        part = "base" if not parameter.requires_grad else "router" if "meft_router" in name else "adapter"
        live.see(parameter, part, extra.weights.get(id(parameter)))
    for buffer in model.buffers():
        live.see(buffer, "base")
    for parameter in trainable:
        more = state_bytes(parameter, step.optimizer)
        states = StateBytes(states.device + more.device, states.paged + more.paged)
    held = [live.allocate(states.device, "optimizer")]
    held += [live.allocate(nbytes, part) for part, nbytes in extra.lasting.items()]
    ids = torch.zeros(step.batch, step.length, dtype=torch.long, device="meta")
    inputs: dict[str, Tensor] = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    if method in TASK_IDS:
        inputs["task_ids"] = ids[:, 0]
    with _ready(model, step, trainable, live), untraceable(method):
        with live:
            for _ in range(min(2, step.accumulation)):
                before = live.flops
                model(**inputs).loss.backward()
        for parameter in trainable:
            parameter.grad = None
    del held
    return Memory(live.at_peak, sum(p.numel() for p in trainable), live.flops - before, states.paged)


@contextmanager
def _ready(model: Any, step: Step, trainable: list[nn.Parameter], live: MemoryTracker) -> Iterator[None]:
    """In training mode; gradients are labelled as such."""

    def note(parameter: Tensor) -> None:
        if parameter.grad is not None:
            live.label(parameter.grad, "gradients")

    hooks = [parameter.register_post_accumulate_grad_hook(note) for parameter in trainable]
    with _quiet():
        model.train()
        if step.checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        try:
            yield
        finally:
            if step.checkpointing:
                model.gradient_checkpointing_disable()
                model.disable_input_require_grads()
            for hook in hooks:
                hook.remove()


@contextmanager
def _quiet() -> Iterator[None]:
    """Advice about how to train has no place in a plan."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
