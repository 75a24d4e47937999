"""transformers' own loading of adapters: `model.load_adapter`, `from_pretrained` of an adapter's folder, `pipeline`.

It goes past PEFT's loading, tensor by tensor, and asks no method whether these are what was saved. So the function that
all of these ways share is replaced by one that lets registered methods look at a file first; other methods' adapters
are loaded as before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.peft import PeftAdapterMixin

Tensors = dict[str, Tensor]
Check = Callable[[nn.Module, Any, str, Tensors], tuple[Tensors, Tensors]]


class _Method(NamedTuple):
    prefix: str
    check: Check
    take_back: Callable[[nn.Module, str], None]


_methods: dict[str, _Method] = {}


def check_native_loads(prefix: str, check: Check, take_back: Callable[[nn.Module, str], None]) -> None:
    """Let a method check files that transformers loads by itself; repeated calls change nothing.

    Args:
        prefix: of the method's tensors, e.g. "meft_"; its upper-case form without "_" is the `PeftType`.
        check: gets the model, the adapter's configuration and name, and the file's tensors, which are mapped and not
            yet read. Returns tensors to load under their keys in the model's state dict, and those that transformers
            shall load, under the file's keys. Raises ValueError where they are not what was saved.
        take_back: removes an adapter (by name) from a model after a failure, so that the model is as before.
    """
    _methods[prefix.strip("_").upper()] = _Method(prefix, check, take_back)
    if not hasattr(PeftAdapterMixin.load_adapter, "_aslora_meft"):
        PeftAdapterMixin.load_adapter = _loading(PeftAdapterMixin.load_adapter)  # type: ignore[method-assign]
        read = _checking(PreTrainedModel._load_pretrained_model)
        PreTrainedModel._load_pretrained_model = staticmethod(read)  # type: ignore[method-assign, assignment]


def _method_of(model: nn.Module, adapter_name: str) -> _Method | None:
    config = getattr(model, "peft_config", {}).get(adapter_name)
    return _methods.get(getattr(config.peft_type, "value", config.peft_type)) if config is not None else None


def _take_back(model: Any, adapter_name: str) -> None:
    method = _method_of(model, adapter_name)
    if method is not None:
        method.take_back(model, adapter_name)
        del model.peft_config[adapter_name]
        if not model.peft_config:
            del model.peft_config
            model._hf_peft_config_loaded = False


def _loading(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_adapter(
        self: Any, peft_model_id: Any = None, adapter_name: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        name = "default" if adapter_name is None else adapter_name
        known = name in getattr(self, "peft_config", {})
        flags = [(p, p.requires_grad) for p in self.parameters()]
        try:
            return load(self, peft_model_id, adapter_name, *args, **kwargs)
        except BaseException:
            if not known:
                _take_back(self, name)
                for parameter, flag in flags:
                    parameter.requires_grad = flag
            raise

    load_adapter._aslora_meft = True  # type: ignore[attr-defined]
    return load_adapter


def _checking(load: Callable[..., Any]) -> Callable[..., Any]:
    """`PreTrainedModel._load_pretrained_model` with a look at the tensors before, and at what was left out after.

    `load_adapter` looks it up when it has added the adapter. So it sees the file also where `load_adapter` itself has
    imported the method, because the file names it.
    """

    @functools.wraps(load)
    def load_pretrained_model(model: Any, state_dict: Any = None, checkpoint_files: Any = None, *args: Any, **kw: Any):  # type: ignore[no-untyped-def]
        name = next(reversed(getattr(model, "peft_config", None) or {"": None}))  # the last that was added
        method = _method_of(model, name)
        if method is None:
            info, offloaded = load(model, state_dict, checkpoint_files, *args, **kw)
            _leave_out_others(model, name, info)
            return info, offloaded
        try:
            with ExitStack() as opened:
                tensors = state_dict if state_dict is not None else _mapped(checkpoint_files, opened)
                own, others = method.check(model, model.peft_config[name], name, tensors)
                info, offloaded = load(model, others, checkpoint_files, *args, **kw)
                model.load_state_dict(own, strict=False)
            info.missing_keys -= own.keys()
            _leave_out_others(model, name, info)
            _check_complete(method, name, info, offloaded)
        except BaseException:
            _take_back(model, name)
            if not getattr(model, "peft_config", None):
                for parameter in model.parameters():  # frozen beside an adapter; `load_adapter` restores it exactly
                    parameter.requires_grad = parameter.is_floating_point()
            raise
        return info, offloaded

    return load_pretrained_model


def _leave_out_others(model: Any, adapter_name: str, info: Any) -> None:
    """Take what belongs to other adapters of our methods out of the tensors that a file is said to lack."""
    others = set(getattr(model, "peft_config", None) or ()) - {adapter_name}
    prefixes = tuple(f".{method.prefix}" for method in _methods.values())
    info.missing_keys -= {
        key for key in info.missing_keys if any(p in key for p in prefixes) and others & set(key.split("."))
    }


def _check_complete(method: _Method, adapter_name: str, info: Any, offloaded: Any) -> None:
    missing = [key for key in info.missing_keys if f".{method.prefix}" in key and adapter_name in key.split(".")]
    unexpected = [key for key in info.unexpected_keys if f".{method.prefix}" in key]
    if left := [key for key in offloaded or () if f".{method.prefix}" in key and adapter_name in key.split(".")]:
        raise ValueError(
            f"{min(left)} is in a layer that lies on disk, where transformers loads nothing: load the adapter by "
            "PeftModel.from_pretrained, or choose a device_map without 'disk'."
        )
    for keys, where in (
        (unexpected, "in the file but not in this model"),
        (missing, "in this model but not in the file"),
    ):
        if keys:
            raise ValueError(
                f"{min(keys)} is {where}: the adapter was saved for another base model or other layers; load the base "
                "model it was trained on, with the saved adapter_config.json."
            )


def _mapped(files: list[str], opened: ExitStack) -> dict[str, Tensor]:
    """The tensors of weight files, mapped into memory."""
    tensors: dict[str, Tensor] = {}
    for name in files:
        if name.endswith(".safetensors"):
            file = opened.enter_context(safe_open(name, framework="pt", device="cpu"))
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
        else:
            tensors |= torch.load(name, map_location="cpu", weights_only=True, mmap=True)
    return tensors
