"""`torch.set_default_device`: an adapter is made, trained, saved and loaded beside its base model, as without one."""

from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel, get_peft_model

FIELDS = {
    "separate": {},
    "joint": {"merge_scope": "joint"},
    "product": {"similarity": "product", "share_a": "joint"},
}


def run(tiny, folder, default, **fields):
    """What a short life of an adapter with two merges leaves, and what is read from its file."""
    base, again = tiny.net(), tiny.net()
    batches = [torch.randn(3, tiny.WIDTH, generator=torch.Generator().manual_seed(i)).double() for i in range(6)]
    torch.manual_seed(3)
    with torch.device(default) if default else nullcontext():
        model = get_peft_model(base, tiny.config(**fields))
        optimizer = torch.optim.SGD(tiny.trainable(model), lr=0.1, momentum=0.9)
        for batch in batches:
            torch.autograd.backward(model(batch).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(again, folder)
        output = loaded(batches[0]).detach()
    assert set(tiny.taken(model).values()) == {2}
    states = {**model.state_dict(), **{f"loaded.{name}": value for name, value in loaded.state_dict().items()}}
    assert not [name for name, value in states.items() if value.device.type != "cpu"]
    return states | {"output": output}


@pytest.mark.parametrize("case", FIELDS)
def test_a_life_is_the_same_bit_for_bit(tiny, tmp_path, case):
    expected = run(tiny, tmp_path / "without", None, **FIELDS[case])
    found = run(tiny, tmp_path / "with", "meta", **FIELDS[case])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
