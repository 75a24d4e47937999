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
from transformers.integrations.peft import PeftAdapterMixin

Check = Callable[[Any, dict[str, Tensor]], dict[str, Tensor]]


class _Method(NamedTuple):
    prefix: str
    check: Check
    take_back: Callable[[nn.Module, str], None]


_methods: dict[str, _Method] = {}


def check_native_loads(prefix: str, check: Check, take_back: Callable[[nn.Module, str], None]) -> None:
    """Let a method check files that transformers loads by itself; repeated calls change nothing.

    Args:
        prefix: of the method's tensors, e.g. "meft_"; its upper-case form without "_" is the `PeftType`.
        check: gets the adapter's configuration and the file's tensors, which are mapped and not yet read. Returns
            those to load, under the file's keys. Raises ValueError where they are not what was saved.
        take_back: removes an adapter (by name) from a model after a failure, so that the model is as before.
    """
    _methods[prefix.strip("_").upper()] = _Method(prefix, check, take_back)
    if not hasattr(PeftAdapterMixin.load_adapter, "_aslora_meft"):
        PeftAdapterMixin.load_adapter = _loading(PeftAdapterMixin.load_adapter)  # type: ignore[method-assign]


def _method_of(model: nn.Module, adapter_name: str) -> _Method | None:
    config = getattr(model, "peft_config", {}).get(adapter_name)
    return _methods.get(getattr(config.peft_type, "value", config.peft_type)) if config is not None else None


def _loading(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_adapter(
        self: Any, peft_model_id: Any = None, adapter_name: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        name = "default" if adapter_name is None else adapter_name
        known = name in getattr(self, "peft_config", {})
        flags = [(p, p.requires_grad) for p in self.parameters()]
        # What reads the files is called as a method of the model, after the adapter was added to it.
        object.__setattr__(self, "_load_pretrained_model", functools.partial(_checked, name, self))
        try:
            return load(self, peft_model_id, adapter_name, *args, **kwargs)
        except BaseException:
            method = _method_of(self, name)
            if method is not None and not known:
                method.take_back(self, name)
                for parameter, flag in flags:
                    parameter.requires_grad = flag
                del self.peft_config[name]
                if not self.peft_config:
                    del self.peft_config
                    self._hf_peft_config_loaded = False
            raise
        finally:
            object.__delattr__(self, "_load_pretrained_model")

    load_adapter._aslora_meft = True  # type: ignore[attr-defined]
    return load_adapter


def _checked(adapter_name: str, owner: Any, **arguments: Any) -> Any:
    """`PreTrainedModel._load_pretrained_model` with a look at the tensors before, and at what was left out after."""
    load = type(owner)._load_pretrained_model
    method = _method_of(owner, adapter_name)
    if method is None:
        return load(**arguments)
    with ExitStack() as opened:
        tensors = arguments["state_dict"]
        if tensors is None:
            tensors = _mapped(arguments["checkpoint_files"], opened)
        arguments["state_dict"] = method.check(owner.peft_config[adapter_name], tensors)
        info, offloaded = load(**arguments)
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
    return info, offloaded


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
