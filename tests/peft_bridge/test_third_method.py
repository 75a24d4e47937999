"""A third method, which adds a vector to the outputs of linear layers: `peft_bridge` is enough for it."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn

from peft_bridge import AdapterFile, MethodConfig, MethodTuner, known_keywords, register_method, write_weights_at_once
from tests.support.training import trainable


@known_keywords
@dataclass
class ShiftConfig(MethodConfig):
    method = "SHIFT"
    remedies: ClassVar = {"r": "leave it out, a shift has no rank"}
    scale: float = field(default=1.0, metadata={"help": "Factor on the vector."})

    def output_fields(self) -> list[Any]:
        return [self.scale]


class ShiftLayer(nn.Module, BaseTunerLayer):
    adapter_layer_names = ("shift_vector",)
    other_param_names = ("scale",)

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.shift_vector, self.scale = base_layer, nn.ParameterDict(), {}

    def update_layer(self, adapter_name: str, config: ShiftConfig) -> None:
        if self.base_layer.out_features % 2:
            raise ValueError("odd")
        self.scale[adapter_name] = config.scale
        self.shift_vector[adapter_name] = nn.Parameter(torch.zeros(self.base_layer.out_features))
        self.set_adapter(self.active_adapters)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = [] if self.disable_adapters else [a for a in self.active_adapters if a in self.scale]
        return sum((self.shift_vector[a] * self.scale[a] for a in active), self.base_layer(x))


class ShiftModel(MethodTuner):
    prefix, tuner_layer_cls, file, target_module_mapping = "shift_", ShiftLayer, AdapterFile("shift_"), {}

    def wrap(self, target, path, parent, adapter_name, config, parameter_name=None) -> ShiftLayer:
        layer = target if isinstance(target, ShiftLayer) else ShiftLayer(target)
        layer.update_layer(adapter_name, config)
        return layer


@pytest.fixture(scope="module", autouse=True)
def registered():
    kind = register_method("shift", ShiftConfig, ShiftModel, "shift_")
    write_weights_at_once("shift_")
    yield
    for known in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        del known[kind]  # tests that ask PEFT for its methods are not meant


class Net(nn.Module):
    def __init__(self, last=4) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


X = torch.linspace(-1, 1, 12).view(3, 4)


def base(seed=0, **sizes):
    torch.manual_seed(seed)
    return Net(**sizes)


def trained(**fields):
    model = get_peft_model(base(), ShiftConfig(target_modules=["up", "down"], **fields))
    optimizer = torch.optim.AdamW(trainable(model), lr=0.1)
    for _ in range(3):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_it_trains_and_comes_back_from_its_file(tmp_path):
    model = trained(scale=2.0)
    assert not torch.equal(model(X), base()(X))
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base(), tmp_path)(X), model(X))
    model.delete_adapter("default")
    assert torch.equal(model.base_model.model(X), base()(X))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t["base_model.model.up.shift_vector"].add_(1), "digest.*restore both files"),
        (lambda t: t.pop("base_model.model.up.shift_vector"), "in this model but not in the file"),
        (lambda t: t.pop("base_model.shift_digest"), "no entry 'base_model.shift_digest'"),
    ],
)
def test_another_file_is_refused(tmp_path, change, match):
    trained().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=match):
        PeftModel.from_pretrained(base(), tmp_path)


def test_a_config_or_model_of_another_save_is_refused(tmp_path):
    trained().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"shape .* load the base model it was trained on"):
        PeftModel.from_pretrained(base(last=2), tmp_path)
    ShiftConfig(target_modules=["up", "down"], scale=3.0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapter_config\.json.*restore both files"):
        PeftModel.from_pretrained(base(), tmp_path)


def test_what_fails_is_taken_back():
    net = base(last=3)
    before = dict(net.named_parameters())
    with pytest.raises(ValueError, match="odd"):
        get_peft_model(net, ShiftConfig(target_modules=["up", "down"]))
    assert dict(net.named_parameters()) == before
    assert all(p.requires_grad for p in net.parameters())
    with pytest.raises(TypeError, match="a shift has no rank"):
        ShiftConfig(r=8)
