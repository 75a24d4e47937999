"""`peft.utils.hotswap.hotswap_adapter` for methods outside of PEFT, which it knows for LoRA only.

Functions of that module that `hotswap_adapter` looks up when it is called are replaced by ones that hand the file of a
registered method to it, and treat all others as before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import peft.utils.hotswap
from torch import Tensor, nn

from ..peft_private import HOTSWAP_CONFIG_KEYS, HOTSWAP_INSERT_NAME
from ..torch_private import uncompiled

Swap = Callable[[nn.Module, Any, str, Mapping[str, Tensor]], None]

_methods: dict[str, Swap] = {}


def allow_hotswap(prefix: str, peft_type: Any, equal_fields: list[str], swap: Swap) -> None:
    """Let adapters of a method be hotswapped; repeated calls change nothing.

    Args:
        prefix: of the method's tensors, e.g. "aslora_".
        peft_type: the method's.
        equal_fields: what the configurations of both adapters must have in common.
        swap: gets the `PeftModel`, the new configuration, the adapter's name and the tensors of its file.
    """
    _methods[prefix] = swap
    HOTSWAP_CONFIG_KEYS[peft_type] = equal_fields
    module: Any = peft.utils.hotswap
    if not hasattr(module.hotswap_adapter_from_state_dict, "_aslora_meft"):
        setattr(module, HOTSWAP_INSERT_NAME, _naming(getattr(module, HOTSWAP_INSERT_NAME)))
        module.hotswap_adapter_from_state_dict = _swapping(module.hotswap_adapter_from_state_dict)


def _naming(insert: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(insert)
    def insert_adapter_name(state_dict: Any, adapter_name: str, parameter_prefix: str) -> Any:
        return state_dict if parameter_prefix in _methods else insert(state_dict, adapter_name, parameter_prefix)

    return insert_adapter_name


def _swapping(swap_lora: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(swap_lora)
    def hotswap_adapter_from_state_dict(
        model: Any, state_dict: Any, adapter_name: str, config: Any, parameter_prefix: str = "lora_"
    ) -> None:
        if parameter_prefix in _methods:
            _methods[parameter_prefix](uncompiled(model), config, adapter_name, state_dict)
        else:
            swap_lora(model, state_dict, adapter_name, config, parameter_prefix)

    hotswap_adapter_from_state_dict._aslora_meft = True  # type: ignore[attr-defined]
    return hotswap_adapter_from_state_dict
