"""What `peft_bridge.accelerate_private` takes from accelerate without its documentation."""

import accelerate
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from peft_bridge.accelerate_private import clip_over_devices, forget_prepared, watch_fsdp2
from peft_bridge.torch_private import left_alone_by_fsdp2


def test_a_model_is_prepared_a_second_time_once_that_is_forgotten(monkeypatch):
    accelerator, model, asked = Accelerator(cpu=True), nn.Linear(2, 2), []
    # Asked of a model that is about to be prepared.
    monkeypatch.setattr(accelerator, "verify_device_map", lambda model: asked.append(model))

    def prepares():
        asked.clear()
        accelerator.prepare_model(model)
        return bool(asked)

    forget_prepared(model)  # never prepared: nothing happens
    assert prepares()
    assert not prepares()
    forget_prepared(model)
    assert prepares()


@left_alone_by_fsdp2
class LeftAlone(nn.Linear):
    pass


def test_modules_that_fsdp2_leaves_alone_are_not_seen_while_a_model_is_prepared(monkeypatch):
    """The rest is tested with FSDP2 by two processes, in `tests/meft/test_fsdp2.py`."""
    names = []

    def prepare(accelerator, model):
        names.extend(name for name, _ in model.named_parameters())
        model.to("meta")
        raise ArithmeticError

    monkeypatch.setattr(accelerate.accelerator, "fsdp2_prepare_model", prepare)
    watch_fsdp2()
    prepared = accelerate.accelerator.fsdp2_prepare_model
    watch_fsdp2()
    assert accelerate.accelerator.fsdp2_prepare_model is prepared  # wrapped once
    model = nn.Sequential(nn.Linear(1, 1, bias=False), LeftAlone(1, 1))
    kept = dict(model[1].named_parameters())
    with pytest.raises(ArithmeticError):
        prepared(None, model)
    assert names == ["0.weight"]
    assert model[0].weight.is_meta
    assert all(parameter is kept[name] for name, parameter in model[1].named_parameters())
    assert not model[1].weight.is_meta
    assert model[1].to("meta").weight.is_meta  # as before


def test_gradients_on_several_devices_are_clipped_as_one_norm(monkeypatch):
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    for parameter, gradient in zip(parameters, ([3.0, 0.0], [0.0, 4.0], None), strict=True):
        parameter.grad = None if gradient is None else torch.tensor(gradient)
    assert float(clip_over_devices(parameters, 1.0)) == 5.0
    torch.testing.assert_close(parameters[1].grad, torch.tensor([0.0, 0.8]))
    assert float(clip_over_devices(parameters[2:], 1.0)) == 0.0
    watch_fsdp2()
    assert float(Accelerator(cpu=True).clip_grad_norm_(parameters[0], 10.0)) == pytest.approx(0.6)
