"""What `peft_bridge.accelerate_private` takes from accelerate without its documentation."""

from accelerate import Accelerator
from torch import nn

from peft_bridge.accelerate_private import forget_prepared


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
