"""Adapters and state dicts that version 0.1 wrote (tests/fixtures/v0_1): what loads is the same model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from meft import MEFTConfig
from meft.files.export import export_resident, load_resident
from tests.support.models import llama_of_0_1

FIXTURES = Path(__file__).parents[1] / "fixtures" / "v0_1"
WEIGHTS = "adapter_model.safetensors"


def base():
    return llama_of_0_1().eval()


def logits(model):
    ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(99))
    with torch.no_grad():
        return model(input_ids=ids).logits


def assert_as_saved(model, name):
    expected = load_file(FIXTURES / name / "expected.safetensors")["logits"]
    torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-6)
    assert (expected - logits(base())).abs().max() > 1e-3  # the adapter does something


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("name", ["meft_lazy", "meft_bf16"])
def test_an_adapter_loads_and_is_saved_under_the_names_of_today(tmp_path, name, low_cpu_mem_usage):
    model = PeftModel.from_pretrained(base(), FIXTURES / name, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_as_saved(model, name)
    model.save_pretrained(tmp_path)
    assert_as_saved(PeftModel.from_pretrained(base(), tmp_path), name)
    old, new = load_file(FIXTURES / name / WEIGHTS), load_file(tmp_path / WEIGHTS)
    for key, tensor in old.items():
        if "digest" not in key:
            now = new.pop(f"{key}.weight" if key.endswith("meft_router") else key)
            assert now.dtype == tensor.dtype
            assert torch.equal(now, tensor)
    assert new.keys() == {"base_model.meft_digest"}
    assert "routing" not in json.loads((tmp_path / "adapter_config.json").read_text())


def test_an_adapter_loads_beside_another(tmp_path):
    model = get_peft_model(base(), MEFTConfig(r=64, num_experts=8, experts_per_token=4, top_k=16))
    model.load_adapter(FIXTURES / "meft_lazy", "old")
    model.set_adapter("old")
    assert_as_saved(model, "meft_lazy")


@pytest.mark.parametrize("name", ["meft_lazy", "meft_bf16"])
def test_a_flipped_bit_is_refused(tmp_path, name):
    folder = tmp_path / "damaged"
    shutil.copytree(FIXTURES / name, folder)
    data = (FIXTURES / name / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    entries = {key: entry for key, entry in json.loads(data[8:start]).items() if key != "__metadata__"}
    for entry in entries.values():
        flipped = bytearray(data)
        flipped[start + entry["data_offsets"][0]] ^= 1
        (folder / WEIGHTS).write_bytes(flipped)
        with pytest.raises(ValueError, match=r"digest.*restore both files"):
            PeftModel.from_pretrained(base(), folder)


def test_a_changed_configuration_is_refused(tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(FIXTURES / "meft_lazy", folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"top_k": 8}))
    with pytest.raises(ValueError, match=r"digest.*restore both files"):
        PeftModel.from_pretrained(base(), folder)


def test_an_adapter_that_routes_by_the_union_names_0_1():
    for load in (
        lambda: PeftModel.from_pretrained(base(), FIXTURES / "meft_union"),
        lambda: PeftConfig.from_pretrained(FIXTURES / "meft_union"),
    ):
        with pytest.raises(ValueError, match=r"routing='union'.*aslora-meft 0\.1") as raised:
            load()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", [PeftConfig, MEFTConfig])
def test_weights_of_the_dense_mode_load_with_a_warning_that_names_0_1(kind):
    with pytest.warns(UserWarning, match=r"aslora-meft 0\.1 with mode='dense'"):
        config = kind.from_pretrained(FIXTURES / "meft_dense")
    assert config.row_optimizer is None
    assert_as_saved(PeftModel.from_pretrained(base(), FIXTURES / "meft_dense", config=config), "meft_dense")


def test_a_configuration_of_0_1_is_read_without_a_warning(recwarn):
    for kind in (PeftConfig, MEFTConfig):
        assert kind.from_pretrained(FIXTURES / "meft_lazy").foreign_fields == []
    assert not [w for w in recwarn if "keyword" in str(w.message)]
    with pytest.raises(TypeError, match="routing"):
        MEFTConfig(routing="per_token")


@pytest.mark.parametrize(("placement", "retrieval", "now"), [("auto", "host", "host"), ("device", "resident", "auto")])
def test_values_that_are_gone_have_their_meaning(placement, retrieval, now):
    config = MEFTConfig(peft_type="MEFT", placement=placement, retrieval=retrieval)  # as from a file
    assert (config.on_host, config.retrieval) == (placement == "auto", now)
    with pytest.raises(ValueError, match="is unknown"):
        MEFTConfig(placement=placement, retrieval=retrieval)


def test_a_field_that_was_renamed():
    assert MEFTConfig(peft_type="MEFT", balance_loss_weight=0.5).router_aux_loss_coef == 0.5  # as from a file
    with pytest.raises(TypeError, match="use router_aux_loss_coef"):
        MEFTConfig(balance_loss_weight=0.5)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_loads(assign):
    model = get_peft_model(base(), MEFTConfig(r=32, num_experts=8, experts_per_token=4, top_k=16))
    state = load_file(FIXTURES / "meft_state_dict" / "state_dict.safetensors")
    assert any(key.endswith("meft_router.default") for key in state)
    found = model.load_state_dict(dict(state), strict=False, assign=assign)
    assert not found.unexpected_keys
    assert not [key for key in found.missing_keys if "meft" in key]
    assert_as_saved(model.eval(), "meft_state_dict")
    whole = {**{key: value for key, value in model.state_dict().items() if "meft" not in key}, **state}
    model.load_state_dict(whole)  # strict


def test_an_adapter_is_exported_as_the_same_model(tmp_path):
    export_resident(FIXTURES / "meft_lazy", tmp_path / "out")
    assert_as_saved(load_resident(base(), tmp_path / "out"), "meft_lazy")


def test_an_export_of_0_1_must_be_written_again(tmp_path):
    export_resident(FIXTURES / "meft_lazy", tmp_path / "out")
    path = tmp_path / "out" / "meft_resident.safetensors"
    save_file(load_file(path) | {"routing.union": torch.tensor(1)}, path)  # without a digest, as 0.1 wrote it
    with pytest.raises(ValueError, match=r"has no digest.*exports of 0\.1.*write it again"):
        load_resident(base(), tmp_path / "out")
