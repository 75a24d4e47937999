import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from meft import export_dense

NO_ROUTING = {"top_k": 48, "experts_per_token": 8, "router_factor": False}


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


def test_modules_to_save_go_along(tiny, tmp_path):
    model = get_peft_model(tiny.base(dtype=torch.float32), tiny.config(modules_to_save=["lm_head"], **NO_ROUTING))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(-2)
    model.save_pretrained(tmp_path / "adapter")
    export_dense(tmp_path / "adapter", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "dense_adapter.safetensors")
    trained = model.base_model.model.lm_head.modules_to_save["default"].weight
    assert torch.equal(tensors["modules_to_save.lm_head.weight"], trained)


@pytest.mark.parametrize("fields", [{"top_k": 47}, {"experts_per_token": 7}, {"router_factor": True}], ids=str)
def test_a_routed_adapter_is_no_dense_one(saved, tmp_path, fields):
    _, folder = saved(**({"top_k": 48, "experts_per_token": 8, "router_factor": False} | fields))
    with pytest.raises(ValueError, match="No dense adapter equals a routed one"):
        export_dense(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_meft_adapter_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"holds no adapter_config\.json"):
        export_dense(tmp_path / "none", tmp_path / "out")
    get_peft_model(tiny.base(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="LORA, not MEFT"):
        export_dense(tmp_path / "lora", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_files_are_refused(saved, tmp_path):
    _, folder = saved(**NO_ROUTING)
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        export_dense(folder, tmp_path / "out")
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="digest"):
        export_dense(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
