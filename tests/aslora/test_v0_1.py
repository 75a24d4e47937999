"""Adapters as 0.1 saved them load with the logits that they had."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from aslora import ASLoRAConfig
from tests.support import training
from tests.support.models import llama_of_0_1

FIXTURES = Path(__file__).parents[1] / "fixtures" / "v0_1"
BATCH = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(99))


def config():
    return ASLoRAConfig(
        r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], merge_start=2, merge_interval=2, total_steps=12
    )


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=BATCH).logits


def expected(folder):
    return load_file(FIXTURES / folder / "expected.safetensors")["logits"]


def train(model):
    training.train(model.train(), [BATCH] * 3, torch.optim.SGD(training.trainable(model), lr=0.1))


@pytest.mark.parametrize("folder", ["aslora_pending", "aslora_finished"])
def test_a_saved_adapter(tmp_path, folder):
    model = PeftModel.from_pretrained(llama_of_0_1(), FIXTURES / folder, is_trainable=True)
    torch.testing.assert_close(logits(model), expected(folder), rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path)
    first, again = (load_file(f / "adapter_model.safetensors") for f in (FIXTURES / folder, tmp_path))
    assert first.keys() == again.keys()
    assert all(torch.equal(again[name], value) for name, value in first.items())  # its digest as well
    train(model)
    report = model.base_model.sharing_report()
    assert {p["merges_taken"] for p in report.projections} == {2}
    assert len(report.merges) == 4


def test_a_damaged_one_is_refused(tmp_path):
    tensors = load_file(FIXTURES / "aslora_finished" / "adapter_model.safetensors")
    next(v for k, v in tensors.items() if k.endswith("stacked_B"))[0, 0, 0] += 1
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "adapter_config.json").write_text((FIXTURES / "aslora_finished" / "adapter_config.json").read_text())
    with pytest.raises(ValueError, match="digest"):
        PeftModel.from_pretrained(llama_of_0_1(), tmp_path)


def test_a_full_state_dict_with_zeros_for_dropped_rows(tmp_path):
    state = load_file(FIXTURES / "aslora_state_dict" / "state_dict.safetensors")
    model = get_peft_model(llama_of_0_1(), config())
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "aslora" in key]
    torch.testing.assert_close(logits(model), expected("aslora_state_dict"), rtol=1e-5, atol=1e-6)
    for B in model.base_model.shared_b("default").values():
        assert B.merges_taken
        assert torch.equal(B.stacked_B, B.stacked_B[B.sharing_map])
    # And given to a save as it is.
    other = get_peft_model(llama_of_0_1(), config())
    other.save_pretrained(tmp_path / "given", state_dict=state)
    model.save_pretrained(tmp_path / "own")
    given, own = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("given", "own"))
    assert given.keys() == own.keys()
    assert all(torch.equal(given[name], value) for name, value in own.items())
    train(model)
