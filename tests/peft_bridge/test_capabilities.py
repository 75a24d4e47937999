"""What PEFT's scripts/generate_method_capabilities.py looks at: its table must be true of both methods.

It reads classes and docstrings, and probes a model whose only module is one layer.
"""

import dataclasses
import re
import sys

import pytest
import torch
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_MIXED_MODEL_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK
from torch import nn
from transformers.pytorch_utils import Conv1D

from aslora import ASLoRAConfig, ASLoRAModel
from meft import MEFTConfig, MEFTModel

METHODS = {"ASLORA": (ASLoRAConfig, ASLoRAModel), "MEFT": (MEFTConfig, MEFTModel)}
PAPERS = {"ASLORA": "https://huggingface.co/papers/2412.10135", "MEFT": "https://huggingface.co/papers/2406.04984"}
PAPER_URL = re.compile(
    r"https://(?:huggingface\.co/papers/|arxiv\.org/(?:abs|pdf)/|openreview\.net/forum\?id=)[^\s)\"'>]+"
)


class Host(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def layer_classes(model_cls):
    module = sys.modules[model_cls.tuner_layer_cls.__module__]
    found = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, BaseTunerLayer)]
    return [c for c in found if c.__module__ == module.__name__]


def probe():
    torch.manual_seed(0)
    return get_peft_model(Host(nn.Linear(64, 64)), ASLoRAConfig(target_modules=["layer"])), torch.randn(2, 64)


def test_mixed_batches():
    for name, (_, model_cls) in METHODS.items():
        found = any(hasattr(c, "_mixed_batch_forward") for c in layer_classes(model_cls))
        assert found == (name == "ASLORA")
    assert hasattr(ASLoRAModel, "_enable_peft_forward_hooks")


def test_merging_and_conversion():
    for name, (_, model_cls) in METHODS.items():
        classes = layer_classes(model_cls)
        merges = any(c.merge is not BaseTunerLayer.merge for c in classes)
        converts = any(c.supports_lora_conversion is not BaseTunerLayer.supports_lora_conversion for c in classes)
        assert merges == converts == (name == "ASLORA")
    model, x = probe()
    assert all(m.supports_lora_conversion("default") for m in model.modules() if isinstance(m, BaseTunerLayer))
    before = model.eval()(x)
    torch.testing.assert_close(model.merge_and_unload()(x), before)


def test_several_and_weighted_adapters():
    model, _ = probe()
    model.add_adapter("second", ASLoRAConfig(target_modules=["layer"]))
    model.set_adapter("second")
    model.add_weighted_adapter(adapters=["default", "second"], weights=[0.5, 0.5], adapter_name="combined")
    assert not hasattr(MEFTModel, "add_weighted_adapter")


LAYERS = {
    "Linear": lambda: nn.Linear(64, 64),
    "Embedding": lambda: nn.Embedding(16, 64),
    "Conv1d": lambda: nn.Conv1d(64, 64, 3),
    "Conv2d": lambda: nn.Conv2d(64, 64, 3),
    "Conv3d": lambda: nn.Conv3d(64, 64, 3),
    "LayerNorm": lambda: nn.LayerNorm(64),
    "MultiheadAttention": lambda: nn.MultiheadAttention(64, num_heads=4),
    "Conv1D (transformers)": lambda: Conv1D(64, 64),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("layer", LAYERS)
def test_target_layers(name, layer):
    taken = {"ASLORA": {"Linear", "Conv1D (transformers)"}, "MEFT": set()}[name]  # MEFT's are whole FFNs
    config = METHODS[name][0](target_modules=["layer"])
    if layer in taken:
        assert any(isinstance(m, BaseTunerLayer) for m in get_peft_model(Host(LAYERS[layer]()), config).modules())
    else:
        with pytest.raises(ValueError, match="layer"):
            get_peft_model(Host(LAYERS[layer]()), config)


@pytest.mark.parametrize("name", METHODS)
def test_fields_and_papers(name):
    config_cls, _ = METHODS[name]
    fields = {f.name for f in dataclasses.fields(config_cls)}
    assert {"modules_to_save", "trainable_token_indices"} <= fields
    assert ("target_parameters" in fields) == (name == "ASLORA")
    assert set(PAPER_URL.findall(config_cls.__doc__)) == {PAPERS[name]}
    peft_type = config_cls().peft_type
    assert peft_type not in PEFT_TYPE_TO_MIXED_MODEL_MAPPING
    assert (peft_type in CONFIG_KEYS_TO_CHECK) == (name == "ASLORA")  # hotswapping
