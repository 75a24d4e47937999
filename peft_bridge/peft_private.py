"""Names of PEFT that its documentation leaves out; `tests/peft_bridge/test_peft_private.py` says what they do."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _check_lora_target_modules_mamba,
    _ExcludedModule,
    _get_in_out_features,
    _get_tuner_state_dict_key_prefixes,
    _is_key_under_prefixes,
)
from peft.utils.other import _set_layer_requires_grad

ExcludedModule = _ExcludedModule
in_out_features = _get_in_out_features
is_key_under_prefixes = _is_key_under_prefixes
set_layer_requires_grad = _set_layer_requires_grad
tuner_state_dict_key_prefixes = _get_tuner_state_dict_key_prefixes


def adapters_of(layer: BaseTunerLayer) -> set[str]:
    """Names of the adapters that an adapted layer holds."""
    return layer._get_available_adapters()


def lora_refuses(model: Any, target_name: str) -> str | None:
    """The model type, if LoRA refuses to adapt modules of this name in models of this type; else None."""
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, target_name)
    except ValueError:
        return str(model.config.model_type)
    return None
