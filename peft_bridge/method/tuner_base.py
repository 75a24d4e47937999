"""What the tuners of methods share: injection that is taken back when it fails, and step and run events."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..accelerate_private import watch_fsdp2
from ..peft_private import adapters_of, is_key_under_prefixes, tuner_state_dict_key_prefixes
from ..training.deepspeed_engines import EngineFollower
from ..training.optimizer_steps import StepListener, count_nonfinite, watch_steps
from ..training.trainer_runs import RunListener, watch_runs
from ..training.uneven_inputs import JoinFollower, follow_joins
from .adapter_file import AdapterFile
from .config_base import MethodConfig
from .quantised import keep_trainable_on_cpu
from .sharded_bases import refuse_sharded


@dataclass
class Injection:
    """One call of `inject_adapter`: what it is for, and the layers that it has wrapped so far."""

    adapter_name: str
    names: set[str]
    """The names in target_modules, as the user gave them."""
    low_cpu_mem_usage: bool
    layers: list[tuple[str, Any]] = field(default_factory=list)
    """(path in the base model, adapted layer)"""

    def has(self, name: str) -> bool:
        """Whether an entry of target_modules matches a layer."""
        return any(path == name or path.endswith(f".{name}") for path, _ in self.layers)


class MethodTuner(BaseTuner, EngineFollower, RunListener):
    """Base of a method's tuner.

    A subclass has `wrap`, and what PEFT asks of a tuner: `prefix`, `tuner_layer_cls` and `target_module_mapping`.

    Attributes:
        reserved: names that no adapter may have, because PEFT would take the method's tensors for the adapter's.
        file: how an adapter lies in a file; None: the subclass saves and loads in its own way.
        injection: the injection that is going on.
    """

    reserved: ClassVar[Iterable[str]] = ()
    file: ClassVar[AdapterFile | None] = None
    injection: Injection

    # ------------------------------------------------------------------ for the subclass

    def prepare(self, model: nn.Module) -> None:
        """Make what all adapters share; called once, before the first adapter."""

    def step_listener(self) -> StepListener | None:
        """Who follows the optimizer steps; None: nobody."""
        return None

    def join_follower(self) -> JoinFollower | None:
        """Who takes part in DDP's `join()`; None: nobody."""
        return None

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters of adapters that are not inside of the adapted model."""
        return ()

    def wrap(
        self, target: nn.Module, path: str, parent: nn.Module, adapter_name: str, config: Any,
        parameter_name: str | None = None,
    ) -> BaseTunerLayer | None:  # fmt: skip
        """The adapted layer for a target: `target` itself where it is one already, with one adapter more.

        Args:
            target: a module of the model that the configuration names.
            path: its path in the base model.
            parent: the module that holds it.
            config: the adapter's configuration.
            parameter_name: the parameter of `target` to adapt, where `target_parameters` names it.

        Raises:
            ValueError: the method cannot adapt this module.
        """
        raise NotImplementedError

    def forget(self, adapter_name: str) -> None:
        """Let go of all that is kept for an adapter outside of its layers."""

    # ------------------------------------------------------------------ injection

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        # Called once, before the first adapter; later adapters come through inject_adapter alone.
        self.prepare(model)
        self._follow()

    def _follow(self) -> None:
        listener = self.step_listener()
        if listener is not None:
            watch_steps(listener)
        follower = self.join_follower()
        if follower is not None:
            follow_joins(follower)
        watch_runs()
        watch_fsdp2()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copied or unpickled model follows its own optimizer too."""
        super().__setstate__(state)
        self._follow()

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Wrap the targeted modules; on an error the model is as before."""
        config: Any = self.peft_config[adapter_name]
        if adapter_name in self.reserved:
            raise ValueError(
                f"adapter_name='{adapter_name}' is the name of a tensor of {config.method}: choose another name."
            )
        refuse_sharded(model, config)
        names = set(config.target_modules) if isinstance(config.target_modules, set | list) else set()
        flags = [(p, p.requires_grad) for p in model.parameters()]
        shared_flags = [(p, p.requires_grad) for p in self.shared_parameters()]
        self.injection = Injection(adapter_name, names, low_cpu_mem_usage)
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except Exception:
            self.take_back(adapter_name)
            for parameter, flag in flags:
                parameter.requires_grad = flag
            raise
        finally:
            del self.injection
            # PEFT sets the flags of all active adapters by the new one's inference_mode, and restores only those of
            # parameters inside of the adapted model.
            for parameter, flag in shared_flags:
                parameter.requires_grad = flag
        keep_trainable_on_cpu(model)  # last: a model that is refused stays as it was

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        parameter_name = optional_kwargs.get("parameter_name")
        layer = self.wrap(target, current_key, parent, adapter_name, peft_config, parameter_name)
        if layer is None:
            return
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)
        self.injection.layers.append((current_key, layer))

    def take_back(self, adapter_name: str) -> None:
        """Remove an adapter with all that was wrapped for it, as if it had not been added."""
        wrapped: list[tuple[str, Any]] = [
            (path, m) for path, m in self.model.named_modules() if isinstance(m, self.tuner_layer_cls)
        ]
        for path, layer in reversed(wrapped):  # of nested ones the inner first
            layer.delete_adapter(adapter_name)
            if not adapters_of(layer):
                parent, _, name = path.rpartition(".")
                setattr(self.model.get_submodule(parent), name, layer.base_layer)
        self.forget(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter with all of its tensors."""
        super().delete_adapter(adapter_name)
        self.forget(adapter_name)

    @property
    def nonfinite_steps(self) -> int:
        """Optimizer steps that were not taken because an adapter's gradient was inf or nan."""
        listener = self.step_listener()
        return listener.nonfinite_steps if listener is not None else 0

    def engine_step_skipped(self) -> None:
        """Count it."""
        listener = self.step_listener()
        if listener is not None:
            count_nonfinite(listener)

    # ------------------------------------------------------------------ saving and loading

    @classmethod
    def _get_adapter_state_dict(  # type: ignore[override]
        cls,
        model: nn.Module,
        config: MethodConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Select an adapter's tensors, gathered where the ranks have shards of them, and add their digest."""
        own = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        own = {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in own.items()}
        if own and cls.file is not None:
            own[cls.file.digest_key] = cls.file.digest_of(cls._under_file_keys(own, adapter_name), config)
        return own

    @classmethod
    def _remap_adapter_state_dict_for_load(  # type: ignore[override]
        cls, model: nn.Module, config: MethodConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check a file's tensors and put the adapter's name into their keys."""
        load = super()._remap_adapter_state_dict_for_load
        if cls.file is None:
            return load(model, config, adapter_name, state_dict)
        prefixes = tuner_state_dict_key_prefixes(model, adapter_name=adapter_name)
        state = model.state_dict()
        current = {key: value for key, value in state.items() if is_key_under_prefixes(key, prefixes)}
        wanted = {key: value.shape for key, value in cls._under_file_keys(current, adapter_name).items()}
        own = cls.file.own_tensors(config, state_dict, wanted)
        others = {key: value for key, value in state_dict.items() if not cls.file.owns(key)}
        loaded = load(model, config, adapter_name, own | others)
        return {key: _sharded_like(state.get(key), value) for key, value in loaded.items()}

    @classmethod
    def _under_file_keys(cls, tensors: dict[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
        named = {cls._remove_adapter_name_from_key(key, adapter_name): value for key, value in tensors.items()}
        return {cls.file.file_key(key): value for key, value in named.items()} if cls.file is not None else named

    # ------------------------------------------------------------------ `ensure_weight_tying`

    # PEFT has this in LoRA's tuner.
    _add_modules_to_save_to_tie = LoraModel._add_modules_to_save_to_tie  # type: ignore[assignment]

    def _add_targets_to_tie(self, peft_config: PeftConfig, tied_weight_keys: list[str]) -> None:
        raise ValueError(
            "ensure_weight_tying=True is for modules_to_save and trainable_token_indices, and target_modules names an "
            "embedding or a layer that is tied to it: take that out of target_modules."
        )


def _sharded_like(like: Tensor | None, value: Tensor) -> Tensor:
    """This rank's shard of a tensor that all ranks have, where FSDP2 shards what it is loaded into; else itself."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
