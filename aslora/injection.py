"""One injection of an adapter: checks names, wraps layers and builds the shared tensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import resolve_quantization_backend
from peft.utils.integrations import init_empty_weights
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_bridge import Injection
from peft_bridge.peft_private import ExcludedModule

from .config import ASLoRAConfig
from .layer import Linear
from .layer_groups import a_group_of, b_group_name, experts_of, group_of_key, module_key, parse_layer_path, tower_of
from .parameter_layer import ParamWrapper, check_parameter
from .shared_a import SharedA
from .sharing.merge_math import planned_merges
from .sharing.merge_unit import MergeUnit
from .sharing.shared_rows import add_diagonal
from .sharing.shared_tensors import SharedB

# To modules_to_save, by task_type, whether the model has such a module or not.
_ADDED_BY_PEFT = {"classifier", "score", "qa_outputs"}


def linear_names(model: nn.Module) -> list[str]:
    """Names of a model's linear layers."""
    names = {k.rpartition(".")[2] for k, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    return sorted(names - {"base_layer"})


def default_targets(
    config: ASLoRAConfig, known: Sequence[str] | None, model_type: str | None, model: nn.Module
) -> set[str] | str | None:
    """`target_modules` where the configuration names none.

    Args:
        known: PEFT's default for LoRA on this type of model; None: it has none.

    Raises:
        ValueError: there is no default, and no `target_parameters` either.
    """
    if known is None and not config.target_parameters:
        raise ValueError(
            f"Please specify `target_modules`: PEFT has no default for model type '{model_type}'; name linear layers "
            f"of this model ({', '.join(linear_names(model))}), or 'all-linear'."
        )
    return known if known is None or isinstance(known, str) else set(known)


def resolve_targets(injection: Injection, model: nn.Module, config: ASLoRAConfig) -> None:
    """Hold the names of the configuration against what was wrapped, and keep of PEFT's defaults what this model has."""
    check_names(injection, model, config)
    if not injection.names and isinstance(config.target_modules, set):
        # PEFT's default of an architecture names modules of its variants too.
        config.target_modules = {name for name in config.target_modules if injection.has(name)}  # type: ignore[assignment]
    if config.target_parameters:
        order_parameters(injection, config)


def check_parameters(configs: Iterable[ASLoRAConfig]) -> None:
    """Raises: ValueError: adapters of one model have different `target_parameters`."""
    named = {frozenset(config.target_parameters or ()) for config in configs} - {frozenset()}
    if len(named) > 1:
        listed = " and ".join(sorted(str(sorted(names)) for names in named))
        raise ValueError(f"target_parameters of several adapters must be the same, and they are {listed}.")


def check_names(injection: Injection, model: nn.Module, config: ASLoRAConfig) -> None:
    """Check that each name matches a module; PEFT accepts a list if one of its names does.

    Raises:
        ValueError: a name in target_modules or modules_to_save matches nothing.
    """
    paths = [path for path, _ in injection.layers]
    excluded = [
        path
        for path, _ in model.named_modules()
        if config.exclude_modules and isinstance(check_target_module_exists(config, path), ExcludedModule)
    ]
    for name in sorted(injection.names):
        if paths and not any(path == name or path.endswith(f".{name}") for path in [*paths, *excluded]):
            limits = [f for f in ("layers_to_transform", "exclude_modules") if getattr(config, f) is not None]
            where = f"that {' and '.join(limits)} leave" if limits else "of the model"
            raise ValueError(
                f"target_modules: '{name}' matches no module {where}: correct it, or choose from "
                f"{', '.join(linear_names(model))}."
            )
    for name in config.target_parameters or []:
        if not injection.has(name):
            stacked = {f"{path}.{n}" for path, m in model.named_modules() for n, p in m.named_parameters(recurse=False)
                       if p.ndim == 3 and not isinstance(m, nn.Conv1d | nn.ConvTranspose1d)}  # fmt: skip
            names = sorted({".".join(path.replace(".base_layer", "").split(".")[-2:]) for path in stacked})
            hint = f"choose from {', '.join(names)}" if names else "this model has no 3-D parameters"
            raise ValueError(f"target_parameters: '{name}' matches no parameter of the model: correct it, or {hint}.")
    everywhere = [path for path, _ in model.named_modules()]
    for name in sorted(set(config.modules_to_save or []) - _ADDED_BY_PEFT):
        if not any(path.endswith(name) for path in everywhere):
            raise ValueError(f"modules_to_save: '{name}' matches no module of the model: correct it or leave it out.")


def build(injection: Injection, model: nn.Module, config: ASLoRAConfig) -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """Group the layers and give them their tensors: key of an A-group -> `SharedA`, of a B-group -> `SharedB`."""
    groups: dict[str, list[tuple[int, Linear | ParamWrapper]]] = {}
    for path, layer in injection.layers:
        parsed = parse_layer_path(path, config.layers_pattern)
        experts = layer.experts if isinstance(layer, ParamWrapper) else None
        name = b_group_name(parsed, layer.in_features, layer.out_features, experts)
        groups.setdefault(name, []).append((parsed.layer, layer))
    _check_merges(config, groups)
    As, Bs = nn.ModuleDict(), nn.ModuleDict()
    with init_empty_weights() if injection.low_cpu_mem_usage else nullcontext():
        for name, members in groups.items():
            members.sort(key=lambda member: member[0])
            _build_group(injection.adapter_name, config, name, members, As, Bs, _device_of_values(model, members[0][1]))
    return As, Bs


def _check_merges(config: ASLoRAConfig, groups: dict[str, list[Any]]) -> None:
    """Say where merges that were asked for have no second layer to merge.

    Raises:
        ValueError: there is none in any group.
    """
    alone = [group.rpartition(":")[0].replace("/", ".") for group, members in groups.items() if len(members) == 1]
    if not config.num_merges or not alone:
        return
    what = f"num_merges={config.num_merges}: {', '.join(alone[:3])}{' ...' if len(alone) > 3 else ''} of this model"
    if len(alone) == len(groups):
        raise ValueError(
            f"{what} has one layer, and so has every projection that is adapted, so that nothing can merge: leave "
            "num_merges out, or use LoRA."
        )
    warnings.warn(f"{what} has one layer, so that nothing merges there.")


def _build_group(
    adapter_name: str,
    config: ASLoRAConfig,
    name: str,
    members: list[tuple[int, Linear | ParamWrapper]],
    As: nn.ModuleDict,
    Bs: nn.ModuleDict,
    device: torch.device,
) -> None:
    first = members[0][1]
    _, dtype = first.device_and_dtype()
    a_name = module_key(a_group_of(name, config.share_a, config.share_a_experts))
    owns_a = a_name not in As
    if owns_a:
        own = 1 if config.share_a_experts else experts_of(name) or 1
        As[a_name] = SharedA(config.r * own, first.in_features, dtype, device)
    A = cast(SharedA, As[a_name])
    layers = [index for index, _ in members]
    merges = planned_merges(len(members), config.num_merges)
    B = SharedB(config.r * (experts_of(name) or 1), first.out_features, layers, merges, dtype, device)
    if config.use_diagonal:
        add_diagonal(B)
    if not config.init_weights:
        nn.init.normal_(B.stacked_B, std=0.02)
        if B.diagonal is not None:
            nn.init.normal_(B.diagonal, std=0.1)
    Bs[module_key(name)] = B
    for position, (_, layer) in enumerate(members):
        layer.attach(adapter_name, A, B, position, owns_a and position == 0)


def _device_of_values(model: nn.Module, layer: Linear | ParamWrapper) -> torch.device:
    """The device for a layer's A and B: its weight's, or the CPU if that is on disk or loaded by a hook."""
    device, _ = layer.device_and_dtype()
    # PEFT has taken the hooks of a model with parts on disk away by now.
    on_disk = "disk" in (getattr(model, "hf_device_map", None) or {}).values()
    offloaded = device.type == "meta" and (on_disk or hasattr(layer.get_base_layer(), "_hf_hook"))
    return torch.device("cpu") if offloaded else device


def merge_units(config: ASLoRAConfig, As: nn.ModuleDict, Bs: nn.ModuleDict) -> list[MergeUnit]:
    """The B-groups that decide together: each alone, or, with `merge_scope="joint"`, by tower and set of layers.

    Raises:
        ValueError: more merges are planned than a group's layers allow.
    """
    together: dict[Any, dict[str, tuple[SharedB, SharedA]]] = {}
    for name, module in Bs.items():
        name, B = group_of_key(name), cast(SharedB, module)
        key = (tower_of(name), tuple(B.layer_indices)) if config.merge_scope == "joint" else name
        together.setdefault(key, {})[name] = (
            B,
            cast(SharedA, As[module_key(a_group_of(name, config.share_a, config.share_a_experts))]),
        )
    return [MergeUnit(config, members) for members in together.values()]


def order_parameters(injection: Injection, config: ASLoRAConfig) -> None:
    """Sort `target_parameters` as the parameters stand in their modules: the order in which LoRA's layers are nested,
    which an export cannot ask the model for."""

    def first(name: str) -> int:
        return next(i for i, (path, _) in enumerate(injection.layers) if path == name or path.endswith(f".{name}"))

    config.target_parameters = sorted(config.target_parameters or [], key=first)


def _new_parameter_layer(
    target: nn.Module, path: str, parameter_name: str, adapter_name: str, config: ASLoRAConfig
) -> ParamWrapper:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    check_parameter(path, getattr(base, parameter_name), config)
    return ParamWrapper(target, adapter_name, parameter_name, config)


def new_layer(
    target: nn.Module,
    path: str,
    adapter_name: str,
    config: ASLoRAConfig,
    quantization: dict[str, Any],
    parameter_name: str | None = None,
) -> Linear | ParamWrapper:
    """Wrap a module in an adapted layer, or one parameter of it.

    Args:
        target: the module, or another method's adapted layer around it.
        path: its path in the model, or the parameter's, for the message.
        quantization: what PEFT's resolver of quantised layers needs.
        parameter_name: the parameter's.

    Raises:
        ValueError: it is no linear layer, or the parameter cannot be adapted.
    """
    if parameter_name is not None:
        return _new_parameter_layer(target, path, parameter_name, adapter_name, config)
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    is_conv1d = isinstance(base, Conv1D)
    if not isinstance(base, nn.Linear | Conv1D) and not _is_quantised_linear(base, quantization):
        fused = any(p.ndim == 3 for p in target.parameters(recurse=False))
        what = "holds fused 3-D expert parameters (name them in target_parameters)" if fused else "is no linear layer"
        raise ValueError(
            f"Target module '{path}' ({type(target).__name__}) is not supported, because it {what}: ASLoRA adapts "
            "nn.Linear, transformers Conv1D and quantised linear layers; change target_modules or name it in "
            "exclude_modules."
        )
    if config.fan_in_fan_out != is_conv1d:
        warnings.warn(
            f"fan_in_fan_out is set to {config.fan_in_fan_out} but the target module is "
            f"`{'Conv1D' if is_conv1d else 'torch.nn.Linear'}`. Setting fan_in_fan_out to {is_conv1d}."
        )
        config.fan_in_fan_out = is_conv1d
    return Linear(target, adapter_name, config, **quantization)


def _is_quantised_linear(base: nn.Module, quantization: dict[str, Any]) -> bool:
    backend = resolve_quantization_backend(base, **quantization)
    return backend is not None and backend.layer_type == "linear"
