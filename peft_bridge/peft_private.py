"""Names of PEFT that its documentation leaves out; `tests/peft_bridge/test_peft_private.py` says what they do."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _check_lora_target_modules_mamba,
    _ExcludedModule,
    _get_in_out_features,
    _get_tuner_state_dict_key_prefixes,
    _is_key_under_prefixes,
)
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK
from peft.utils.other import _set_layer_requires_grad

UPDATE_OFFLOAD_NAME = "_update_offload"
HOTSWAP_CONFIG_KEYS = CONFIG_KEYS_TO_CHECK
HOTSWAP_INSERT_NAME = "_insert_adapter_name_into_state_dict"
ExcludedModule = _ExcludedModule
in_out_features = _get_in_out_features
is_key_under_prefixes = _is_key_under_prefixes
set_layer_requires_grad = _set_layer_requires_grad
tuner_state_dict_key_prefixes = _get_tuner_state_dict_key_prefixes


def adapters_of(layer: BaseTunerLayer) -> set[str]:
    """Names of the adapters that an adapted layer holds."""
    return layer._get_available_adapters()


def saved_peft_type(folder: Any, **hub: Any) -> str:
    """The method that a saved adapter's configuration names.

    Args:
        hub: subfolder, revision, cache_dir and token, for an adapter on the hub.

    Raises:
        ValueError: there is no configuration.
    """
    return str(PeftConfig._get_peft_type(folder, **hub))


def lora_refuses(model: Any, target_name: str) -> str | None:
    """The model type, if LoRA refuses to adapt modules of this name in models of this type; else None."""
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, target_name)
    except ValueError:
        return str(model.config.model_type)
    return None
