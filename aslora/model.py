"""The tuner: injects layers, owns the shared tensors, follows optimizer steps, and lays adapters out for saving."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule, check_target_module_exists
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from peft.utils.integrations import init_empty_weights
from peft.utils.other import _set_layer_requires_grad
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_bridge import RunListener

from . import storage
from .bank import SharedA, SharedB
from .combine import combine
from .config import ASLoRAConfig
from .groups import a_group_of, b_group_name, place, tower_of
from .layer import ASLoRALayer, Linear
from .mixed_batch import adapters_per_sample
from .report import SharingReport, report
from .run import SharingRun
from .sharing import planned_merges
from .unit import MergeUnit

# To modules_to_save, by task_type, whether the model has such a module or not.
_ADDED_BY_PEFT = {"classifier", "score", "qa_outputs"}


@dataclass
class _Injection:
    """One call of `inject_adapter`: what it is for, and the layers that it has wrapped so far."""

    adapter_name: str
    names: set[str]
    """The names in target_modules, as the user gave them."""
    low_cpu_mem_usage: bool
    layers: list[tuple[str, Linear]] = field(default_factory=list)

    def check_names(self, model: nn.Module, config: ASLoRAConfig) -> None:
        """PEFT is content if one of the names matches; a name without a match is most likely misspelt."""
        paths = [path for path, _ in self.layers]
        excluded = [
            path
            for path, _ in model.named_modules()
            if config.exclude_modules and isinstance(check_target_module_exists(config, path), _ExcludedModule)
        ]
        for name in sorted(self.names):
            if paths and not any(path == name or path.endswith(f".{name}") for path in [*paths, *excluded]):
                linear = {k.rpartition(".")[2] for k, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
                limits = [f for f in ("layers_to_transform", "exclude_modules") if getattr(config, f) is not None]
                where = f"that {' and '.join(limits)} leave" if limits else "of the model"
                raise ValueError(
                    f"target_modules: '{name}' matches no module {where}: correct it, or choose from "
                    f"{', '.join(sorted(linear - {'base_layer'}))}."
                )
        everywhere = [path for path, _ in model.named_modules()]
        for name in sorted(set(config.modules_to_save or []) - _ADDED_BY_PEFT):
            if not any(path.endswith(name) for path in everywhere):
                raise ValueError(
                    f"modules_to_save: '{name}' matches no module of the model: correct it or leave it out."
                )


class ASLoRAModel(BaseTuner, RunListener):
    """ASLoRA in PEFT's frame; made by `get_peft_model(model, ASLoRAConfig(...))` and reached as `model.base_model`.

    The sharing runs by itself: after each optimizer step (torch's global optimizer hooks) the running averages are
    sampled and the merges that are due are taken.

    Attributes:
        aslora_A: adapter -> A-group -> `SharedA`.
        aslora_B: adapter -> B-group -> `SharedB`.
        run: follows the optimizer steps and takes the merges.
    """

    uses_shared_state = True
    prefix = "aslora_"
    tuner_layer_cls = ASLoRALayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    aslora_A: nn.ModuleDict
    aslora_B: nn.ModuleDict
    run: SharingRun

    @property
    def configs(self) -> dict[str, ASLoRAConfig]:
        """Adapter -> its configuration."""
        return self.peft_config  # type: ignore[return-value]

    def shared_a(self, adapter_name: str) -> dict[str, SharedA]:
        """A-group -> its A."""
        return dict(self.aslora_A[adapter_name].items())  # type: ignore[operator]

    def shared_b(self, adapter_name: str) -> dict[str, SharedB]:
        """B-group -> its B."""
        return dict(self.aslora_B[adapter_name].items())  # type: ignore[operator]

    # ------------------------------------------------------------------ injection

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        # Called once, before the first adapter; later adapters come through inject_adapter alone.
        self.aslora_A = nn.ModuleDict()
        self.aslora_B = nn.ModuleDict()
        self.run = SharingRun()

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Wrap the targeted layers and build the adapter's shared tensors; on an error the model is as before."""
        config = self.configs[adapter_name]
        if adapter_name in storage.RESERVED:
            raise ValueError(f"adapter_name='{adapter_name}' is the name of a tensor of ASLoRA: choose another name.")
        names = set(config.target_modules) if isinstance(config.target_modules, set | list) else set()
        base_flags = [(p, p.requires_grad) for p in model.parameters()]
        shared_flags = [(p, p.requires_grad) for p in self.run.watched_parameters()]
        self._injection = _Injection(adapter_name, names, low_cpu_mem_usage)
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except Exception:
            self._take_back(self._injection)
            for parameter, flag in base_flags:
                parameter.requires_grad = flag
            raise
        finally:
            # PEFT sets the flags of all active adapters by the new one's inference_mode, and restores only those of
            # parameters inside the adapted model.
            for parameter, flag in shared_flags:
                parameter.requires_grad = flag

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        # PEFT comes here when all layers are wrapped and nothing else is: what fails now can be taken back whole.
        self._injection.check_names(model, self.configs[self._injection.adapter_name])
        self._build(self._injection)
        super()._mark_only_adapters_as_trainable(model)

    def _create_and_replace(  # type: ignore[override]
        self,
        config: ASLoRAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        if isinstance(target, Linear):
            target.update_layer(adapter_name, config)
            layer = target
        else:
            layer = self._new_layer(config, adapter_name, target, current_key)
            self._replace_module(parent, target_name, layer, target)
        self._injection.layers.append((current_key, layer))

    def _new_layer(self, config: ASLoRAConfig, adapter_name: str, target: nn.Module, path: str) -> Linear:
        kwargs = get_quantization_kwargs(self.model)
        layer = None
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        is_conv1d = isinstance(base, Conv1D)
        if isinstance(base, nn.Linear | Conv1D) or _is_quantised_linear(base, kwargs):
            if config.fan_in_fan_out != is_conv1d:
                warnings.warn(
                    f"fan_in_fan_out is set to {config.fan_in_fan_out} but the target module is "
                    f"`{'Conv1D' if is_conv1d else 'torch.nn.Linear'}`. Setting fan_in_fan_out to {is_conv1d}."
                )
                config.fan_in_fan_out = is_conv1d
            layer = Linear(target, adapter_name, config, **kwargs)
        if layer is None:
            fused = any(p.ndim == 3 for p in target.parameters(recurse=False))
            what = "holds fused 3-D expert parameters" if fused else "is no linear layer"
            raise ValueError(
                f"Target module '{path}' ({type(target).__name__}) is not supported, because it {what}: ASLoRA adapts "
                "nn.Linear, transformers Conv1D and quantised linear layers; change target_modules or name it in "
                "exclude_modules."
            )
        return layer

    def _build(self, injection: _Injection) -> None:
        """Group the layers that were injected and give them their A and B."""
        config = self.configs[injection.adapter_name]
        groups: dict[str, list[tuple[int, Linear]]] = {}
        for path, layer in injection.layers:
            where = place(path, config.layers_pattern)
            name = b_group_name(where, layer.in_features, layer.out_features)
            groups.setdefault(name, []).append((where.layer, layer))
        As, Bs = nn.ModuleDict(), nn.ModuleDict()
        with init_empty_weights() if injection.low_cpu_mem_usage else nullcontext():
            for name, members in groups.items():
                members.sort(key=lambda member: member[0])
                self._build_group(injection.adapter_name, name, members, As, Bs)
        train = injection.adapter_name in self.active_adapters and not config.inference_mode
        _set_layer_requires_grad(As, train)
        _set_layer_requires_grad(Bs, train)
        self.aslora_A[injection.adapter_name], self.aslora_B[injection.adapter_name] = As, Bs
        self.run.add(injection.adapter_name, self._units(injection.adapter_name), config.total_steps)

    def _build_group(
        self, adapter_name: str, name: str, members: list[tuple[int, Linear]], As: nn.ModuleDict, Bs: nn.ModuleDict
    ) -> None:
        config = self.configs[adapter_name]
        first = members[0][1]
        device, dtype = first.device_and_dtype()
        a_name = a_group_of(name, config.share_a)
        leads_a = a_name not in As
        if leads_a:
            As[a_name] = SharedA(config.r, first.in_features, dtype, device)
        A = cast(SharedA, As[a_name])
        layers = [index for index, _ in members]
        merges = planned_merges(len(members), config.num_merges)
        B = SharedB(config.r, first.out_features, layers, merges, dtype, device)
        if not config.init_weights:
            nn.init.normal_(B.stacked_B, std=0.02)
        Bs[name] = B
        for position, (_, layer) in enumerate(members):
            layer.attach(adapter_name, A, B, position, leads_a and position == 0)

    def _units(self, adapter_name: str) -> list[MergeUnit]:
        config = self.configs[adapter_name]
        together: dict[Any, dict[str, tuple[SharedB, SharedA]]] = {}
        As = self.shared_a(adapter_name)
        for name, B in self.shared_b(adapter_name).items():
            key = (tower_of(name), tuple(B.layer_indices)) if config.merge_scope == "joint" else name
            together.setdefault(key, {})[name] = (B, As[a_group_of(name, config.share_a)])
        return [MergeUnit(config, members) for members in together.values()]

    def _take_back(self, injection: _Injection) -> None:
        """Undo a failed injection."""
        for path, layer in injection.layers:
            layer.delete_adapter(injection.adapter_name)
            if not layer.r:
                parent, _, name = path.rpartition(".")
                setattr(self.model.get_submodule(parent), name, layer.base_layer)
        self._drop(injection.adapter_name)

    def _drop(self, adapter_name: str) -> None:
        for owner in (self.aslora_A, self.aslora_B):
            if adapter_name in owner:
                del owner[adapter_name]
        self.run.remove(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter with its shared tensors."""
        super().delete_adapter(adapter_name)
        self._drop(adapter_name)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Raise 16- and 8-bit A and B to float32, in place, so that they stay shared and known to an optimizer."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype and adapter_name in self.aslora_A:
            for parameter in (*self.aslora_A[adapter_name].parameters(), *self.aslora_B[adapter_name].parameters()):
                if parameter.dtype.itemsize < 4:
                    parameter.data = parameter.data.to(torch.float32)

    # ------------------------------------------------------------------ the run and its report

    def update_and_allocate(self, global_step: int) -> None:
        """Take optimizer step `global_step` (1-indexed) into account, where torch's optimizer hooks cannot see it.

        Only needed with engines that step on copies of the parameters (DeepSpeed); a step that was already counted
        changes nothing, so calling it in any training loop is safe.
        """
        for adapter_name in self.active_adapters:
            self.run.catch_up(adapter_name, global_step)

    def on_run_begin(self, total_steps: int) -> None:
        """A Trainer's run begins: its length is T where the configuration does not say otherwise."""
        for adapter_name, config in self.configs.items():
            if config.total_steps is None:
                self.run.total_steps[adapter_name] = total_steps

    def on_run_end(self) -> None:
        """A Trainer's run has ended: merges that were not done are worth a warning."""
        for adapter_name in self.active_adapters:
            self.run.warn_of_pending(adapter_name)

    def finish_sharing(self, adapter_name: str | None = None) -> None:
        """End the sharing of an adapter (None: of all): no further merges, and the saved file holds no averages."""
        for name in [adapter_name] if adapter_name is not None else list(self.run.units):
            self.run.finish(name)

    def sharing_report(self, adapter_name: str | None = None) -> SharingReport:
        """Which layers share what, every merge, and the counts of values and bytes (None: the active adapter)."""
        name = adapter_name or self.active_adapters[0]
        return report(name, self.run.units[name])

    @property
    def nonfinite_steps(self) -> int:
        """Optimizer steps that were not taken because an adapter's gradient was inf or nan."""
        return self.run.nonfinite_steps

    # ------------------------------------------------------------------ forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for adapter_name in set(self.active_adapters) & set(self.aslora_B):
            for B in self.shared_b(adapter_name).values():
                B.forget_views()
        return super().forward(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Bring `adapter_names` (one name a sample, `__base__` for none) to the layers, for inference."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = set(adapter_names) - {"__base__"} - set(self.aslora_B)
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        with adapters_per_sample(self, self.model, adapter_names, kwargs.get("num_beams")):
            yield

    # ------------------------------------------------------------------ combining

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter that combines others; see `aslora.combine.combine`.

        `density` and `majority_sign_method` are PEFT's, for kinds of combination that ASLoRA does not have; they are
        not used.
        """
        combine(self, adapters, weights, adapter_name, combination_type, svd_rank)

    # ------------------------------------------------------------------ saving, loading, DDP

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Every rank computes the same averages and maps from the same B: DDP need not broadcast them."""
        return [f"base_model.{n}" for n, _ in self.named_buffers() if n.startswith(("aslora_A.", "aslora_B."))]

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        if storage.in_memory(key, adapter_name):
            return storage.key_in_file(key, adapter_name)
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _get_adapter_state_dict(  # type: ignore[override]
        cls,
        model: nn.Module,
        config: ASLoRAConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Select an adapter's tensors and compact them: rows that no layer reads are not saved."""
        biases = cls._get_learnable_bias_state_dict(model, state_dict, config)
        return {**storage.to_file(state_dict, adapter_name, config), **biases}

    @classmethod
    def _remap_adapter_state_dict_for_load(  # type: ignore[override]
        cls, model: nn.Module, config: ASLoRAConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check a file's tensors, expand them, and put the adapter's name into their keys."""
        others = {key: value for key, value in state_dict.items() if not storage.owns(key)}
        own = storage.from_file(state_dict, model.state_dict(), adapter_name, config)
        return {**super()._remap_adapter_state_dict_for_load(model, config, adapter_name, others), **own}


def _is_quantised_linear(base: nn.Module, kwargs: dict[str, Any]) -> bool:
    backend = resolve_quantization_backend(base, **kwargs)
    return backend is not None and backend.layer_type == "linear"
