"""Names of accelerate that its documentation leaves out; `tests/peft_bridge/test_accelerate_private.py` tests them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, accelerator
from accelerate.utils import fsdp_utils
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from .torch_private import is_left_alone_by_fsdp2

Kind = TypeVar("Kind", bound=type[nn.Module])


def forget_prepared(model: nn.Module) -> None:
    """Let `Accelerator.prepare` take a model, not wrapped by DDP, as one that it has not prepared yet."""
    vars(model).pop("_is_accelerate_prepared", None)


# ------------------------------------------------------------------ FSDP2


_stateful: list[type[nn.Module]] = []


def stateful_under_fsdp2(kind: Kind) -> Kind:
    """Decorate a class of an adapter's modules whose buffers a run goes on from, and which has other tensors in a file.

    accelerate raises an error for all buffers where it sends a model to other ranks (`cpu_ram_efficient_loading`):
    those of such modules stay, since all ranks have the same. And its sharded checkpoints have what PEFT would write
    into a file: they get the parameters and buffers instead.
    """
    _stateful.append(kind)
    return kind


def watch_fsdp2() -> None:
    """Let accelerate treat modules right that are `left_alone_by_fsdp2` or `stateful_under_fsdp2`.

    While it shards a model it casts and empties each parameter, and expects shards in the place of all; and it takes
    all gradients to be on one device. Repeated calls change nothing.
    """
    for module, name, wrap in (
        (accelerator, "fsdp2_prepare_model", _leaving_alone),
        (fsdp_utils, "_get_model_state_dict", _as_they_are),
        (fsdp_utils, "_set_model_state_dict", _as_they_are),
        (Accelerator, "clip_grad_norm_", _over_devices),
    ):
        function = getattr(module, name, None)  # an accelerate without it raises its own error under FSDP2
        if function is not None and not hasattr(function, "_aslora_meft"):
            wrapped = functools.wraps(function)(wrap(function))
            wrapped._aslora_meft = True  # type: ignore[attr-defined]
            setattr(module, name, wrapped)


def _leaving_alone(prepare: Callable[..., Any]) -> Callable[..., Any]:
    def prepared(accelerator: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        kept = [(m, m._parameters) for m in model.modules() if is_left_alone_by_fsdp2(m)]
        owners = [m for m in model.modules() if isinstance(m, tuple(_stateful))]
        buffers = [(m, set(m._buffers) - m._non_persistent_buffers_set) for m in owners]
        for module, _ in kept:
            vars(module).update(_parameters={}, _apply=functools.partial(_unchanged, module))
        for module, names in buffers:
            module._non_persistent_buffers_set |= names
        try:
            return prepare(accelerator, model, *args, **kwargs)
        finally:
            for module, parameters in kept:
                vars(module)["_parameters"] = parameters
                del vars(module)["_apply"]
            for module, names in buffers:
                module._non_persistent_buffers_set -= names

    return prepared


def _unchanged(module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    return module


def _as_they_are(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(model: nn.Module, *args: Any, adapter_only: bool = False, sd_options: Any = None) -> Any:
        if adapter_only and sd_options is not None and any(isinstance(m, tuple(_stateful)) for m in model.modules()):
            adapter_only, sd_options = False, replace(sd_options, ignore_frozen_params=True, strict=False)
        return function(model, *args, adapter_only=adapter_only, sd_options=sd_options)

    return wrapped


def _over_devices(clip: Callable[..., Any]) -> Callable[..., Any]:
    def clipped(self: Accelerator, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if not self.is_fsdp2 or len({p.grad.device for p in parameters if p.grad is not None}) < 2:
            return clip(self, parameters, max_norm, norm_type)
        self.unscale_gradients()
        return clip_over_devices(parameters, max_norm, norm_type)

    return clipped


def clip_over_devices(parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float = 2) -> Tensor:
    """As `torch.nn.utils.clip_grad_norm_`, of gradients on several devices, some of which are shards.

    Returns:
        the norm of all gradients, on the device of the first one.
    """
    groups: dict[tuple[Any, torch.device], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            groups.setdefault((mesh, parameter.grad.device), []).append(parameter)
    if not groups:
        return torch.tensor(0.0, device="cpu")
    norms: list[Any] = [get_total_norm([p.grad for p in group], norm_type) for group in groups.values()]  # type: ignore[misc]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]), norm_type)
    for (mesh, device), group in groups.items():
        here = total.to(device)
        clip_grads_with_norm_(group, max_norm, here if mesh is None else DTensor.from_local(here, mesh))
    return total
