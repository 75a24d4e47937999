"""What `peft_bridge.peft_private` takes from PEFT without its documentation."""

import peft.utils.hotswap
import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PretrainedConfig

from peft_bridge import peft_private
from peft_bridge.peft_private import (
    ExcludedModule,
    adapters_of,
    in_out_features,
    is_key_under_prefixes,
    lora_refuses,
    saved_peft_type,
    set_layer_requires_grad,
    tuner_state_dict_key_prefixes,
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.down(self.up(x))


def adapted():
    return get_peft_model(Net(), LoraConfig(r=2, target_modules=["up"]))


def test_an_excluded_module_is_told_from_one_that_is_not_named():
    config = LoraConfig(target_modules=["up", "down"], exclude_modules=["down"])
    assert isinstance(check_target_module_exists(config, "down"), ExcludedModule)
    assert not isinstance(check_target_module_exists(config, "other"), ExcludedModule)


def test_sizes_of_a_linear_layer():
    assert in_out_features(nn.Linear(3, 5)) == (3, 5)


def test_adapters_of_a_layer():
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["up", "down"]))
    assert adapters_of(model.base_model.model.up) == {"default", "second"}
    assert adapters_of(model.base_model.model.down) == {"second"}


def test_the_type_of_a_saved_adapter(tmp_path):
    with pytest.raises(ValueError, match="config"):
        saved_peft_type(tmp_path / "none")
    LoraConfig().save_pretrained(tmp_path)
    assert saved_peft_type(tmp_path) == "LORA"


def test_loading_an_offloaded_model_looks_the_index_up_in_the_class():
    assert callable(getattr(PeftModel, peft_private.UPDATE_OFFLOAD_NAME))
    assert peft_private.UPDATE_OFFLOAD_NAME in PeftModel.load_adapter.__code__.co_names


def test_keys_of_adapted_layers():
    model = adapted()
    prefixes = tuner_state_dict_key_prefixes(model, adapter_name="default")
    found = {key for key in model.state_dict() if is_key_under_prefixes(key, prefixes)}
    assert found == {f"base_model.model.up.lora_{part}.default.weight" for part in "AB"}


def test_a_layer_is_set_to_train_or_not():
    layer = nn.Linear(2, 2)
    set_layer_requires_grad(layer, False)
    assert not any(p.requires_grad for p in layer.parameters())


def test_what_lora_refuses_in_an_architecture():
    class Model(nn.Module):
        def __init__(self, model_type):
            super().__init__()
            self.config = PretrainedConfig()
            self.config.model_type = model_type

    assert lora_refuses(Model("mamba"), "out_proj") == "mamba"
    assert lora_refuses(Model("mamba"), "in_proj") is None
    assert lora_refuses(Model("llama"), "out_proj") is None
    assert lora_refuses(Net(), "out_proj") is None


def test_hotswap_looks_both_names_up_when_it_is_called():
    """`allow_hotswap` replaces one and adds to the other."""
    names = peft.utils.hotswap.hotswap_adapter.__code__.co_names
    assert peft_private.HOTSWAP_INSERT_NAME in names
    assert "hotswap_adapter_from_state_dict" in names
    check = peft.utils.hotswap.check_hotswap_configs_compatible
    assert "CONFIG_KEYS_TO_CHECK" in check.__code__.co_names
    assert check.__globals__["CONFIG_KEYS_TO_CHECK"] is peft_private.HOTSWAP_CONFIG_KEYS
