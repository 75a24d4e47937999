"""The tuner: injects layers, owns the shared tensors, follows optimizer steps, saves and loads adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, get_quantization_kwargs
from torch import Tensor, nn

from peft_bridge import MethodTuner, StateOfLastRanks
from peft_bridge.peft_private import lora_refuses, set_layer_requires_grad

from . import native
from .config import ASLoRAConfig
from .files import keys
from .files.adapter_file import to_file
from .injection import build, check_parameters, default_targets, merge_units, new_layer, resolve_targets
from .layer import ASLoRALayer, Linear
from .layer_groups import group_of_key
from .mixed_batch import adapters_per_sample, check_names_of_samples
from .parameter_layer import ParamWrapper
from .report import SharingReport, report
from .shared_a import SharedA
from .sharing.merge_run import SharingRun, ZeroRun
from .sharing.shared_tensors import SharedB
from .weighted_adapter import combine


class ASLoRAModel(ZeroRun, MethodTuner):
    """ASLoRA in PEFT's frame; made by `get_peft_model(model, ASLoRAConfig(...))` and reached as `model.base_model`.

    The sharing runs by itself: after each optimizer step (torch's global optimizer hooks) the running averages are
    updated and the merges that are due are taken.

    Attributes:
        aslora_A: adapter -> key of an A-group -> `SharedA`.
        aslora_B: adapter -> key of a B-group -> `SharedB`.
        run: follows the optimizer steps and takes the merges.
    """

    uses_shared_state = False  # without a PeftModel a module of the model owns what is shared
    reserved = keys.RESERVED
    prefix = "aslora_"
    tuner_layer_cls = ASLoRALayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    aslora_A: nn.ModuleDict
    aslora_B: nn.ModuleDict
    run: SharingRun
    _warmup_of: Callable[[int], int] | None = None

    @property
    def configs(self) -> dict[str, ASLoRAConfig]:
        """Adapter of this method -> its configuration; without a `PeftModel` a model may have others' as well."""
        return {name: config for name, config in self.peft_config.items() if isinstance(config, ASLoRAConfig)}

    def shared_a(self, adapter_name: str) -> dict[str, SharedA]:
        """A-group -> its A."""
        return {group_of_key(k): A for k, A in self.aslora_A[adapter_name].items()}  # type: ignore[operator, union-attr]

    def shared_b(self, adapter_name: str) -> dict[str, SharedB]:
        """B-group -> its B."""
        return {group_of_key(k): B for k, B in self.aslora_B[adapter_name].items()}  # type: ignore[operator, union-attr]

    # ------------------------------------------------------------------ injection

    def __init__(self, model: nn.Module, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        self.wrapped = not isinstance(peft_config, PeftConfig)  # a PeftModel gives a dict of them
        super().__init__(model, peft_config, *args, **kwargs)

    def prepare(self, model: nn.Module) -> None:
        shared = native.SharedInModel() if self.wrapped else native.shared_for(model, self)
        self.aslora_A, self.aslora_B, self.run = shared.aslora_A, shared.aslora_B, shared.run

    def step_listener(self) -> SharingRun:
        return self.run

    def join_follower(self) -> StateOfLastRanks:
        return self.run.ranks

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        return self.run.watched_parameters()

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        """Raises: ValueError: adapters of one model have different `target_parameters`, as in LoRA."""
        super()._check_new_adapter_config(config)
        check_parameters(self.configs.values())

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        config: Any = peft_config
        if config.target_modules is None:
            known = self.target_module_mapping.get(str(model_config.get("model_type")))
            config.target_modules = default_targets(config, known, model_config.get("model_type"), self.model)
        return config

    def _check_target_module_compatiblity(self, peft_config: PeftConfig, model: nn.Module, target_name: str) -> None:
        """Raises: ValueError: the architecture reads the layer's weight without calling it (Mamba's `out_proj`)."""
        if (model_type := lora_refuses(model, target_name)) is not None:
            raise ValueError(
                f"target_modules: '{target_name}' of model type '{model_type}' cannot be adapted: fused "
                "kernels read its weight without calling it; leave it out (exclude_modules)."
            )

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        # PEFT calls this once all layers are wrapped, and before anything else: an error here can be rolled back.
        injection = self.injection
        config = self.configs[injection.adapter_name]
        resolve_targets(injection, model, config)
        As, Bs = build(injection, model, config)
        units = merge_units(config, As, Bs)
        train = injection.adapter_name in self.active_adapters and not config.inference_mode
        set_layer_requires_grad(As, train)
        set_layer_requires_grad(Bs, train)
        self.aslora_A[injection.adapter_name], self.aslora_B[injection.adapter_name] = As, Bs
        self.run.add(injection.adapter_name, units, config.total_steps)
        if not self.wrapped:
            for _, layer in injection.layers:
                layer.on_delete = self.forget
        super()._mark_only_adapters_as_trainable(model)

    def wrap(
        self, target: nn.Module, path: str, parent: nn.Module, adapter_name: str, config: ASLoRAConfig,
        parameter_name: str | None = None,
    ) -> ASLoRALayer:  # fmt: skip
        if isinstance(target, Linear | ParamWrapper) and getattr(target, "parameter_name", None) == parameter_name:
            target.update_layer(adapter_name, config)
            return target
        return new_layer(target, path, adapter_name, config, get_quantization_kwargs(self.model), parameter_name)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, ParamWrapper) or isinstance(new_module, ParamWrapper):
            setattr(parent, child_name, new_module)  # the inherited one looks for a weight
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def take_back(self, adapter_name: str) -> None:
        """Remove an adapter with all that was wrapped for it."""
        super().take_back(adapter_name)
        if not self.wrapped:
            native.remove_if_empty(self.model)

    def forget(self, adapter_name: str) -> None:
        for owner in (self.aslora_A, self.aslora_B):
            if adapter_name in owner:
                del owner[adapter_name]
        self.run.remove(adapter_name)

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

        Only needed with engines that step on copies of the parameters, but for DeepSpeed's ZeRO, whose steps are seen:
        layers that share get equal B again, and merges are taken. With an optimizer that is seen, it does the first
        only. Call it after steps that were taken.

        Raises:
            ValueError: the engine holds B flattened or in parts.
        """
        for adapter_name in self.active_adapters if not self.follows_engine else ():
            self.run.record_step(adapter_name, global_step)

    def check_run(self, arguments: Any) -> None:
        """A Trainer's run is about to begin: its arguments say how long the learning rate rises."""
        self._warmup_of = getattr(arguments, "get_warmup_steps", None)

    def on_run_begin(self, total_steps: int, done_steps: int = 0, steps_seen: bool = True) -> None:
        """A Trainer's run begins: its length is T where the configuration does not say otherwise."""
        warmup_steps = int(self._warmup_of(total_steps)) if self._warmup_of is not None else 0
        self._warmup_of = None
        for adapter_name in self.run.units:
            self.run.warmup_steps[adapter_name] = warmup_steps
            if self.configs[adapter_name].total_steps is None:
                self.run.total_steps[adapter_name] = total_steps

    def log_scalars(self) -> dict[str, float]:
        """For a Trainer's logs: the merges so far, and how many values the active adapter trains."""
        if not self.active_adapters or self.active_adapters[0] not in self.run.units:
            return {}
        Bs = self.shared_b(self.active_adapters[0]).values()
        values = sum(A.shared_A.numel() for A in self.shared_a(self.active_adapters[0]).values())
        values += sum((len(B.stacked_B) - B.merges_taken) * B.stacked_B.shape[1:].numel() for B in Bs)
        values += sum(B.diagonal.numel() for B in Bs if B.diagonal is not None)
        return {"aslora/merges": sum(B.merges_taken for B in Bs), "aslora/trainable_values": values}

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
        return report(name, self.run.units_of(name), self.run.warmup_steps[name])

    # ------------------------------------------------------------------ forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for adapter_name in set(self.active_adapters) & set(self.aslora_B):
            for B in self.shared_b(adapter_name).values():
                B.forget_views()
        return super().forward(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Pass `adapter_names` (one name per sample, `__base__` for none) to the layers, for inference."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        check_names_of_samples(adapter_names, self.aslora_B.keys(), self.training)
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
        """Add an adapter that combines others; see `aslora.weighted_adapter.combine`.

        `density` and `majority_sign_method` are PEFT's, for kinds of combination that ASLoRA does not have; they are
        not used.
        """
        combine(self, adapters, weights, adapter_name, combination_type, svd_rank)

    # ------------------------------------------------------------------ saving, loading, DDP

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Every rank computes the same averages and maps from the same B: DDP need not broadcast them."""
        return [f"base_model.{n}" for n, _ in self.named_buffers() if n.startswith(("aslora_A.", "aslora_B."))]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take state dicts of 0.1 as well, which had the groups' names as keys."""
        for key in [k for k in state_dict if k.startswith((f"{prefix}aslora_A.", f"{prefix}aslora_B."))]:
            state_dict[prefix + keys.key_now(key.removeprefix(prefix))] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        if keys.in_memory(key, adapter_name):
            return keys.key_in_file(key, adapter_name)
        if keys.owns(keys.file_key(key)):
            return key
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
        """Select an adapter's tensors and compact them: of rows that layers share one is saved."""
        biases = cls._get_learnable_bias_state_dict(model, state_dict, config)
        shared = native.shared_in(model)
        tuner: Any = shared.tuner if shared else next(module for module in model.modules() if isinstance(module, cls))
        layers = {group: B.layer_indices for group, B in tuner.shared_b(adapter_name).items()}
        if shared is None:
            return {**to_file(state_dict, adapter_name, config, layers), **biases}
        own = to_file(native.as_wrapped(state_dict), adapter_name, config, layers)
        # transformers puts PEFT's prefix before each key.
        return {**{key.removeprefix("base_model."): value for key, value in own.items()}, **biases}

    @classmethod
    def _remap_adapter_state_dict_for_load(  # type: ignore[override]
        cls, model: nn.Module, config: ASLoRAConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check a file's tensors, expand them, and put the adapter's name into their keys."""
        own, others = native.own_and_others(model, config, adapter_name, state_dict)
        return {**super()._remap_adapter_state_dict_for_load(model, config, adapter_name, others), **own}
