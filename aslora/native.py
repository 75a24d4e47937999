"""Adapters in a model that no `PeftModel` wraps: transformers' `load_adapter` and `add_adapter`, PEFT's
`inject_adapter_in_model`.

PEFT drops the tuner there and keeps the model alone. So a module of the model's own, `aslora_shared`, holds the tensors
that layers share, and with them the tuner. Its place in the state dict stands for that of the tuner in a `PeftModel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from peft_bridge import RunListener

from .config import ASLoRAConfig
from .files import keys
from .files.adapter_file import from_file
from .sharing.merge_run import SharingRun
from .sharing.shared_tensors import SharedB

NAME = "aslora_shared"
_WRAPPED = "base_model."  # where a `PeftModel` has the tuner


class SharedInModel(nn.Module, RunListener):
    """Owns the A and B of a model's ASLoRA adapters, and follows a Trainer's run with them.

    Attributes:
        tuner: the tuner of the adapter that was added last; all of them have the same tensors and the same run.
    """

    aslora_A: nn.ModuleDict
    aslora_B: nn.ModuleDict
    run: SharingRun
    tuner: Any

    def __init__(self) -> None:
        super().__init__()
        self.aslora_A, self.aslora_B = nn.ModuleDict(), nn.ModuleDict()
        self.run = SharingRun()

    def before_forward(self, model: nn.Module, inputs: Any) -> None:
        """Let the layers take the rows of B anew, as `ASLoRAModel.forward` does."""
        for module in self.aslora_B.modules():
            if isinstance(module, SharedB):
                module.forget_views()

    def check_run(self, arguments: Any) -> None:
        self.tuner.check_run(arguments)

    def on_run_begin(self, total_steps: int, done_steps: int = 0, steps_seen: bool = True) -> None:
        self.tuner.on_run_begin(total_steps, done_steps, steps_seen)

    def on_run_end(self) -> None:
        for adapter_name in self.run.units:
            self.run.warn_of_pending(adapter_name)

    @property
    def follows_engine(self) -> bool:
        return self.tuner.follows_engine  # type: ignore[no-any-return]

    def set_deepspeed_parallelism(self, *_: Any) -> None:
        """See `peft_bridge.EngineFollower`."""
        self.tuner.set_deepspeed_parallelism()

    def update_and_allocate(self, global_step: int) -> None:
        for adapter_name in self.run.units:
            self.run.record_step(adapter_name, global_step)


def shared_in(model: nn.Module) -> SharedInModel | None:
    """The owner of a model's shared tensors; None in a `PeftModel`, whose tuner owns them."""
    found = dict(model.named_children()).get(NAME)
    return found if isinstance(found, SharedInModel) else None


def shared_for(model: nn.Module, tuner: Any) -> SharedInModel:
    """The same, made where there is none; it belongs to this tuner from now on."""
    shared = shared_in(model)
    if shared is None:
        shared = SharedInModel()
        setattr(model, NAME, shared)
        shared._hook = model.register_forward_pre_hook(shared.before_forward)  # type: ignore[assignment]
    object.__setattr__(shared, "tuner", tuner)  # hidden from nn.Module's registry: the tuner holds the model
    return shared


def remove_if_empty(model: nn.Module) -> None:
    """Take the owner out of a model that has no ASLoRA adapter."""
    shared = shared_in(model)
    if shared is not None and not shared.aslora_B:
        shared._hook.remove()  # type: ignore[operator, union-attr]
        delattr(model, NAME)


def take_back(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter, as if it had not been added."""
    shared = shared_in(model)
    if shared is not None:
        shared.tuner.take_back(adapter_name)


def as_wrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model under the keys that they would have in a `PeftModel`."""
    return {_moved(key, f"{NAME}.", _WRAPPED): value for key, value in tensors.items()}


def as_in_model(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `as_wrapped`, for ASLoRA's own tensors."""
    return {_moved(key, _WRAPPED, f"{NAME}."): value for key, value in tensors.items()}


def _moved(key: str, old: str, new: str) -> str:
    return new + key.removeprefix(old) if key.startswith(old) else key


def own_and_others(
    model: nn.Module, config: ASLoRAConfig, adapter_name: str, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a file: ASLoRA's own, checked and expanded, under the model's keys; and the others as given.

    Raises:
        ValueError: the file is damaged, or does not belong to this configuration or this model.
    """
    others = {key: value for key, value in tensors.items() if not keys.owns(keys.file_key(key))}
    if shared_in(model) is None:
        return from_file(tensors, model.state_dict(), adapter_name, config), others
    own = from_file(tensors, as_wrapped(model.state_dict()), adapter_name, config)
    return as_in_model(own), others
