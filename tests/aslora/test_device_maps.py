"""Models whose layers are on two GPUs, by accelerate's hooks: A and B come to where they are read.

The GPUs are stand-ins, whose operations on tensors of two devices fail (`tests/support/two_gpus.py`).
"""

import pytest
import torch
from accelerate import dispatch_model
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from tests.support.tiny_aslora import Tiny
from tests.support.training import assert_close, trainable
from tests.support.two_gpus import two_gpus

FIRST, SECOND = "cuda:0", "cuda:1"
MAP = {"layers.0": FIRST, "layers.1": FIRST, "layers.2": SECOND, "layers.3": SECOND, "head": SECOND}
OF_PEFT = {f"base_model.model.{name}": place for name, place in MAP.items()}


@pytest.fixture(autouse=True)
def gpus(monkeypatch):
    with two_gpus(monkeypatch):
        yield


def spread(model, places):
    return dispatch_model(model, places, main_device=FIRST, force_hooks=True)


def spread_first(**fields):
    """As with `from_pretrained(device_map="auto")`."""
    return get_peft_model(spread(Tiny.net(), MAP), Tiny.config(**fields))


def adapted_first(**fields):
    return spread(Tiny.adapted(**fields), OF_PEFT | {"base_model.aslora_A": FIRST, "base_model.aslora_B": SECOND})


def trained(model, steps=5):
    """With clipping over all devices."""
    optimizer = Tiny.adamw(model)
    for step in range(1, steps + 1):
        Tiny.backward(model, step)
        torch.nn.utils.clip_grad_norm_(trainable(model), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    return model


def state(model):
    return {name: value.detach().cpu() for name, value in model.state_dict().items() if ".aslora_" in name}


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (spread_first, {}),
        (adapted_first, {"share_a": "joint", "similarity": "product"}),
        (adapted_first, {"merge_value": "mean", "merge_scope": "joint"}),
    ],
)
def test_a_spread_model_trains_merges_and_saves_as_one_on_one_device(tmp_path, make, fields):
    expected, model = trained(Tiny.adapted(**fields)), trained(make(**fields))
    assert {p.device for p in model.get_base_model().parameters()} == {torch.device(FIRST), torch.device(SECOND)}
    assert Tiny.maps(model) == Tiny.maps(expected)
    assert set(Tiny.taken(model).values()) == {2}
    assert_close(state(model), state(expected))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(spread(Tiny.net(), MAP), tmp_path)
    x = Tiny.inputs(expected)
    logits = expected(x)
    for one in (model, again, again.merge_and_unload()):
        torch.testing.assert_close(one(x).cpu(), logits)
    assert all(not value.is_meta for value in load_file(tmp_path / "adapter_model.safetensors").values())
