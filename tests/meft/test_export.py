import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM

from meft import export_dense, export_resident, load_resident
from tests.support.models import llama
from tests.support.models import model as model_of


@pytest.fixture
def saved(tiny, tmp_path):
    """Saves an adapter of the given fields; returns the model and the folder."""

    def save(**fields):
        model = tiny.adapted(dtype=torch.float32, **fields)
        model.save_pretrained(tmp_path / "adapter")
        return model.eval(), tmp_path / "adapter"

    return save


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("fields", [{}, {"router_factor": False}, {"top_k": 48}], ids=str)
def test_resident_tensors_give_the_adapters_logits(tiny, saved, tmp_path, fields):
    model, folder = saved(**fields)
    export_resident(folder, tmp_path / "out")
    base = tiny.base(dtype=torch.float32).eval()
    ids = tiny.batch()
    before = logits(base, ids)
    resident = load_resident(base, tmp_path / "out")
    torch.testing.assert_close(logits(resident, ids), logits(model, ids), rtol=1e-5, atol=1e-5)
    assert (logits(resident, ids) - before).abs().max() > 0.01  # the adapter does something


def test_the_layout_is_the_documented_one(tiny, saved, tmp_path):
    model, folder = saved()
    export_resident(folder, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "meft_resident.safetensors")
    routing = {name.removeprefix("routing."): int(value) for name, value in tensors.items() if "routing." in name}
    assert routing == {"num_experts": 8, "experts_per_token": 3, "top_k": 5, "router_factor": 1, "union": 0}
    for i, layer in enumerate(tiny.layers(model)):
        keys, values = layer.tables("default")
        path = f"model.layers.{i}.mlp"
        assert torch.equal(tensors.pop(f"{path}.keys"), keys.rows)
        assert torch.equal(tensors.pop(f"{path}.values"), values.rows)
        assert torch.equal(tensors.pop(f"{path}.router"), layer.router("default"))
    assert all(name.startswith("routing.") for name in tensors)


def test_the_dense_configuration_is_a_dense_adapter(tiny, saved, tmp_path):
    model, folder = saved(top_k=48, experts_per_token=8, router_factor=False)
    export_dense(folder, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "dense_adapter.safetensors")
    base = tiny.base(dtype=torch.float32).eval()
    for path, module in list(base.named_modules()):
        if path.endswith(".mlp"):
            up, down = (tensors.pop(f"{path}.{name}.weight") for name in ("up", "down"))
            module.register_forward_hook(lambda m, x, y, up=up, down=down: y + (x[0] @ up.T).relu() @ down.T)
    assert not tensors
    ids = tiny.batch()
    torch.testing.assert_close(logits(base, ids), logits(model, ids), rtol=1e-5, atol=1e-5)


def test_modules_to_save_go_along_and_leave_tied_ones_alone(tiny, tmp_path):
    fields = {"tie_word_embeddings": True}
    model = get_peft_model(tiny.base(dtype=torch.float32, **fields), tiny.config(modules_to_save=["lm_head"])).eval()
    tiny.enlarge(model)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(-2)
    model.save_pretrained(tmp_path / "adapter")
    export_resident(tmp_path / "adapter", tmp_path / "out")
    base = tiny.base(dtype=torch.float32, **fields).eval()
    embedding = base.get_input_embeddings().weight.detach().clone()
    ids = tiny.batch()
    resident = load_resident(base, tmp_path / "out")
    torch.testing.assert_close(logits(resident, ids), logits(model, ids), rtol=1e-5, atol=1e-5)
    assert torch.equal(resident.get_input_embeddings().weight, embedding)


@pytest.mark.parametrize("fields", [{"top_k": 47}, {"experts_per_token": 7}, {"router_factor": True}], ids=str)
def test_a_routed_adapter_is_no_dense_one(saved, tmp_path, fields):
    _, folder = saved(**({"top_k": 48, "experts_per_token": 8, "router_factor": False} | fields))
    with pytest.raises(ValueError, match="No dense adapter equals a routed one"):
        export_dense(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bert_joins_the_residual(tiny, tmp_path):
    base = model_of(BertForMaskedLM, intermediate_size=64, max_position_embeddings=512).eval()
    ids = tiny.batch()
    state = {name: value.clone() for name, value in base.state_dict().items()}
    model = get_peft_model(base, tiny.config())
    tiny.enlarge(model)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model.eval(), ids)
    export_resident(tmp_path / "adapter", tmp_path / "out")
    other = BertForMaskedLM(base.config).eval()
    other.load_state_dict(state)
    torch.testing.assert_close(logits(load_resident(other, tmp_path / "out"), ids), expected, rtol=1e-5, atol=1e-5)


def test_what_is_no_meft_adapter_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"holds no adapter_config\.json"):
        export_resident(tmp_path / "none", tmp_path / "out")
    get_peft_model(tiny.base(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="LORA, not MEFT"):
        export_resident(tmp_path / "lora", tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds no meft_resident\.safetensors"):
        load_resident(tiny.base(), tmp_path / "lora")
    assert not (tmp_path / "out").exists()


def test_damaged_files_are_refused(saved, tmp_path):
    _, folder = saved()
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        export_resident(folder, tmp_path / "out")
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="digest"):
        export_resident(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_base_model_is_refused_and_left_alone(tiny, saved, tmp_path):
    _, folder = saved()
    export_resident(folder, tmp_path / "out")
    export_resident(folder, tmp_path / "whole")
    wide = llama(hidden_size=64, intermediate_size=64)
    base = tiny.base(layers=1)
    before = [type(module) for module in base.modules()]
    with pytest.raises(ValueError, match=r"no module 'model\.layers\.1\.mlp'"):
        load_resident(base, tmp_path / "out")
    assert [type(module) for module in base.modules()] == before
    with pytest.raises(ValueError, match="have 32 values where the model's hidden size is 64"):
        load_resident(wide, tmp_path / "whole")
    file = tmp_path / "whole" / "meft_resident.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged"):
        load_resident(base, tmp_path / "whole")


RESIDENT = "meft_resident.safetensors"


@pytest.fixture
def exported(saved, tmp_path):
    export_resident(saved()[1], tmp_path / "out")
    return tmp_path / "out" / RESIDENT


def refused(tiny, file, match):
    """In one sentence, and the model is as before."""
    base = tiny.base(dtype=torch.float32)
    before = [type(module) for module in base.modules()]
    with pytest.raises(ValueError, match=match) as raised:
        load_resident(base, file.parent)
    assert "\n" not in str(raised.value)
    assert [type(module) for module in base.modules()] == before


def test_a_flipped_bit_in_each_exported_tensor_is_refused(tiny, exported):
    data = exported.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    entries = {k: v for k, v in json.loads(data[8:start]).items() if k != "__metadata__"}
    assert len(entries) == 11
    for entry in entries.values():
        flipped = bytearray(data)
        flipped[start + entry["data_offsets"][0]] ^= 1
        exported.write_bytes(flipped)
        refused(tiny, exported, r"digest .* does not match its tensors.*--to resident")


def test_an_exported_tensor_that_is_missing_or_too_many_is_refused(tiny, exported):
    with safe_open(exported, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(exported)
    for name in tensors:
        save_file({k: v for k, v in tensors.items() if k != name}, exported, metadata=metadata)
        refused(tiny, exported, "digest")
    save_file(tensors | {"model.layers.0.mlp.bias": torch.zeros(2)}, exported, metadata=metadata)
    refused(tiny, exported, "digest")
    save_file(tensors, exported)
    refused(tiny, exported, "has no digest.*write it again")


FFN = "model.layers.1.mlp"
WRONG = {
    "routing.top_k": ({"routing.top_k": None}, r"no integer routing\.top_k"),
    "top_k": ({"routing.top_k": torch.tensor(49)}, r"top_k=49 are impossible with r=48"),
    "top_k a float": ({"routing.top_k": torch.tensor(5.0)}, r"no integer routing\.top_k"),
    "experts_per_token": ({"routing.experts_per_token": torch.tensor(0)}, r"experts_per_token=0.*impossible"),
    "num_experts": ({"routing.num_experts": torch.tensor(7)}, r"do not fit each other and num_experts=7"),
    "router_factor": ({"routing.router_factor": torch.tensor(2)}, "router_factor=2 must be 0 or 1"),
    "union": ({"routing.union": torch.tensor(1)}, "union=1 must be 0"),
    "no router": ({f"{FFN}.router": None}, rf"'{FFN}' \(it has keys, values where keys, router, values are needed"),
    "router": ({f"{FFN}.router": torch.zeros(8, 31)}, r"router \[8, 31\]"),
    "values": ({f"{FFN}.values": torch.zeros(47, 32)}, r"values \[47, 32\]"),
    "keys": ({f"{FFN}.keys": torch.zeros(48, 32, dtype=torch.int32)}, "floating-point"),
    "another part": ({f"{FFN}.bias": torch.zeros(32)}, "it has bias, keys, router, values"),
}


@pytest.mark.parametrize(("change", "match"), WRONG.values(), ids=WRONG)
def test_wrong_fields_of_an_export_are_refused(tiny, exported, change, match):
    """Also where whoever changed them made a new digest."""
    from meft.files.export import _digest

    tensors = {name: value for name, value in (load_file(exported) | change).items() if value is not None}
    save_file(tensors, exported, metadata={"sha256": _digest(tensors)})
    refused(tiny, exported, match)
