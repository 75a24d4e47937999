"""axolotl's plug-in over a stand-in of axolotl's base class: axolotl needs Python 3.12 and its own pinned packages.

`tests/accept/axolotl_plugin.py` runs it in the real one.
"""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from pydantic import BaseModel, ValidationError
from torch import nn

from aslora import ASLoRAConfig
from meft import MEFTConfig
from tests.support.models import llama

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "axolotl"
FIELDS = {
    "aslora": {"r": 2, "target_modules": ["q_proj"], "init_weights": False},
    "meft": {"r": 16, "num_experts": 4, "experts_per_token": 2, "top_k": 4, "init_weights": False},
}
IDS = torch.arange(1, 9)[None]


class Config(dict):
    """As axolotl's: a field that is not there is None."""

    __getattr__ = dict.get


@pytest.fixture
def plugin(monkeypatch):
    """The module of the plug-in, imported over the stand-in."""

    @dataclass(frozen=True)
    class AdapterCapabilities:
        name: str
        lora_like: bool = False
        relora: bool = False

    base = ModuleType("axolotl.integrations.base")
    base.AdapterCapabilities, base.BasePlugin = AdapterCapabilities, type("BasePlugin", (), {})
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    yield importlib.import_module("aslora_meft.plugins.axolotl")
    del sys.modules["aslora_meft.plugins.axolotl"]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("method", FIELDS)
def test_an_adapter_is_made_saved_and_loaded(plugin, method, tmp_path):
    ours = plugin.AsloraMeftPlugin()
    cfg = Config(adapter=method, seed=3, **{method: FIELDS[method]})
    model, config = ours.load_adapter(llama(), cfg)
    assert (type(config), config.r) == ({"aslora": ASLoRAConfig, "meft": MEFTConfig}[method], FIELDS[method]["r"])
    assert config.task_type == "CAUSAL_LM"
    expected = logits(model)
    again, _ = ours.load_adapter(llama(), cfg)
    assert torch.equal(logits(again), expected)  # the seed decides
    assert not torch.equal(logits(llama()), expected)
    model.save_pretrained(tmp_path)
    for inference in (True, False):
        loaded, config = ours.load_adapter(llama(), Config(cfg, lora_model_dir=str(tmp_path)), inference=inference)
        assert torch.equal(logits(loaded), expected)
        assert config is loaded.peft_config["default"]
        assert any(p.requires_grad for p in loaded.parameters()) == (not inference)
    other = "meft" if method == "aslora" else "aslora"
    with pytest.raises(ValueError, match=f"holds an adapter of {method.upper()}.* set adapter: {method}"):
        ours.load_adapter(llama(), Config(adapter=other, lora_model_dir=str(tmp_path)))


def test_only_the_configuration_is_made_for_trainers_that_add_adapters(plugin):
    ours, base = plugin.AsloraMeftPlugin(), llama()
    nothing, config = ours.load_adapter(base, Config(adapter="meft", meft=FIELDS["meft"]), config_only=True)
    assert nothing is None
    assert config.r == 16
    assert type(base.model.layers[0].mlp) is type(llama().model.layers[0].mlp)
    _, config = ours.load_adapter(base, Config(adapter="aslora", reward_model=True), config_only=True)
    assert config.task_type == "SEQ_CLS"


def test_other_adapters_are_left_to_axolotl(plugin):
    assert plugin.AsloraMeftPlugin().load_adapter(nn.Linear(1, 1), Config(adapter="lora")) is None
    found = plugin.AsloraMeftPlugin().get_adapter_capabilities()
    names = {capability.name: capability.lora_like for capability in found}
    assert names == {"aslora": False, "meft": False}


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"adapter": "meft", "meft": {"rank": 4}}, "unexpected keyword argument 'rank'"),
        ({"adapter": "meft", "meft": {"r": -1}}, "r=-1"),
        ({"adapter": "meft", "lora_r": 8}, "lora_r=8 has no effect with adapter: meft: remove it"),
        ({"adapter": "aslora", "meft": {"r": 8}}, "meft=.* has no effect with adapter: aslora"),
    ],
)
def test_wrong_fields_are_found_with_the_yaml(plugin, fields, match):
    module, _, name = plugin.AsloraMeftPlugin().get_input_args().rpartition(".")
    arguments = getattr(sys.modules[module], name)

    class Whole(BaseModel):  # as axolotl adds the plug-in's fields to its own
        adapter: str | None = None
        lora_r: int | None = None

    whole = type("Whole", (Whole, arguments), {})
    with pytest.raises(ValidationError, match=match):
        whole(**fields)
    assert whole(adapter="lora", lora_r=8).meft is None


@pytest.mark.parametrize("method", FIELDS)
def test_the_example_is_valid(plugin, method):
    fields = yaml.safe_load((EXAMPLES / f"{method}.yaml").read_text())
    assert fields["plugins"] == [f"{plugin.__name__}.AsloraMeftPlugin"]
    assert plugin.config_of(Config(fields)).r == fields[method]["r"]
