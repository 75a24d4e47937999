"""PEFT's reading and writing of weights: other methods' as ever, ours whole or not at all and on the host."""

import errno
import importlib
import shutil
import threading
from pathlib import Path

import peft.peft_model
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import meft
from meft import MEFTConfig
from peft_bridge import last_loaded_folder, write_weights_at_once
from peft_bridge.files import weights

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            [nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))})]
        )

    def forward(self, x):
        return self.layers[0]["mlp"](x)


def adapted(method, **fields):
    if method == "lora":
        return get_peft_model(
            Net(), LoraConfig(r=2, target_modules=["mlp.0", "mlp.2"], init_lora_weights=False, **fields)
        )
    config = MEFTConfig(r=8, num_experts=2, experts_per_token=2, top_k=4, target_modules=["mlp"], init_weights=False)
    return get_peft_model(Net(), config)


@pytest.fixture
def plain(monkeypatch):
    """Use PEFT's own functions for a while."""

    def use():
        module = peft.peft_model
        for name in ("safe_save_file", "load_peft_weights"):
            monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)
        return monkeypatch

    return use


def test_wrapping_again_changes_nothing():
    before = peft.peft_model.safe_save_file, peft.peft_model.load_peft_weights
    for _ in range(3):
        write_weights_at_once("meft_", load_on_host=True)
        write_weights_at_once("aslora_")
    importlib.reload(meft)
    assert (peft.peft_model.safe_save_file, peft.peft_model.load_peft_weights) == before
    assert not hasattr(before[0].__wrapped__, "__wrapped__")
    assert not hasattr(before[1].__wrapped__, "__wrapped__")


def test_a_lora_file_is_the_same_bytes_as_without_us(tmp_path, plain):
    model = adapted("lora")
    model.save_pretrained(tmp_path / "ours")
    plain()
    model.save_pretrained(tmp_path / "theirs")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_a_lora_file_is_written_by_pefts_own_function_in_place(tmp_path, monkeypatch):
    seen = []
    real = peft.peft_model.safe_save_file.__wrapped__
    recording = weights._saving(
        lambda tensors, path, *a, **k: (seen.append(Path(path).name), real(tensors, path, *a, **k))
    )
    monkeypatch.setattr(peft.peft_model, "safe_save_file", recording)
    adapted("lora").save_pretrained(tmp_path / "lora")
    adapted("meft").save_pretrained(tmp_path / "meft")
    assert seen[0] == WEIGHTS
    assert seen[1].startswith(f".{WEIGHTS}.")
    assert sorted(p.name for p in (tmp_path / "meft").iterdir()) == sorted(["README.md", CONFIG, WEIGHTS])


def test_a_lora_adapter_loads_as_ever(tmp_path):
    model = adapted("lora")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(), tmp_path)
    x = torch.randn(3, 8)
    assert torch.equal(loaded(x), model(x))
    loaded.load_adapter(tmp_path, "second")
    loaded.set_adapter("second")
    assert torch.equal(loaded(x), model(x))


def test_a_lora_adapter_in_memory_loads_from_a_folder_without_a_config(tmp_path):
    """PEFT reads no config for an adapter that exists."""
    model = adapted("lora")
    model.save_pretrained(tmp_path)
    (tmp_path / CONFIG).unlink()
    other = adapted("lora")
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_" in name:
                parameter.zero_()
    other.load_adapter(tmp_path, "default")
    x = torch.randn(3, 8)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize(("method", "expected"), [("lora", ["meta", "cpu", None]), ("meft", ["cpu", "cpu", "cpu"])])
def test_the_device_that_is_asked_for_holds_for_others_only(tmp_path, monkeypatch, method, expected):
    adapted(method).save_pretrained(tmp_path)
    asked = []

    def load(model_id, device=None, *args, **kwargs):
        asked.append(device)
        return load_file(Path(model_id) / WEIGHTS)

    monkeypatch.setattr(peft.peft_model, "load_peft_weights", weights._loading(load))
    for device in ("meta", "cpu", None):
        peft.peft_model.load_peft_weights(str(tmp_path), device)
    assert asked == expected
    asked.clear()
    peft.peft_model.load_peft_weights(str(tmp_path), device="meta")
    assert asked == expected[:1]


def test_a_subfolder_is_known_too(tmp_path, monkeypatch):
    adapted("meft").save_pretrained(tmp_path / "sub")
    asked = []

    def load(model_id, device=None, *args, subfolder=None, **kwargs):
        asked.append((device, subfolder))
        return load_file(Path(model_id) / subfolder / WEIGHTS)

    monkeypatch.setattr(peft.peft_model, "load_peft_weights", weights._loading(load))
    peft.peft_model.load_peft_weights(str(tmp_path), "meta", subfolder="sub")
    assert asked == [("cpu", "sub")]


@pytest.mark.parametrize("failing", ["save", "sync", "replace"])
def test_our_files_are_whole_or_the_old_ones(tmp_path, monkeypatch, failing):
    first = adapted("meft")
    first.save_pretrained(tmp_path)
    before = (tmp_path / WEIGHTS).read_bytes()
    second = adapted("meft")
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(1)

    def fail(*args, **kwargs):
        if failing == "save":
            Path(args[1]).write_bytes(b"part")
        raise OSError(errno.ENOSPC, "No space left on device")

    if failing == "save":
        monkeypatch.setattr(peft.peft_model, "safe_save_file", weights._saving(fail))
    elif failing == "sync":
        monkeypatch.setattr(weights, "sync", fail)
    else:
        monkeypatch.setattr(weights.os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        second.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert (tmp_path / WEIGHTS).read_bytes() == before
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
    second.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() != before


def test_a_reader_keeps_the_old_file(tmp_path):
    """Weights that are mapped from a file stay as they are while it is saved anew."""
    model = adapted("meft")
    model.save_pretrained(tmp_path)
    before = (tmp_path / WEIGHTS).read_bytes()
    with (tmp_path / WEIGHTS).open("rb") as reader:
        with torch.no_grad():
            model.base_model.adapted_ffns()["layers.0.mlp"].router("default").add_(1)
        model.save_pretrained(tmp_path)
        assert reader.read() == before
    assert (tmp_path / WEIGHTS).read_bytes() != before


def test_tensors_that_only_look_like_ours_go_through(tmp_path):
    tensors = {"base_model.model.not_meft_rows": torch.ones(2)}
    peft.peft_model.safe_save_file(tensors, str(tmp_path / "file"), metadata={"format": "pt"})
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    assert (tmp_path / "file").read_bytes() == (tmp_path / "expected").read_bytes()


def test_the_folder_that_was_read_last_is_known_in_its_thread(tmp_path):
    adapted("meft").save_pretrained(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    model = PeftModel.from_pretrained(Net(), tmp_path / "one")
    assert last_loaded_folder() == str(tmp_path / "one")
    elsewhere = []
    thread = threading.Thread(target=lambda: elsewhere.append(last_loaded_folder()))
    thread.start()
    thread.join()
    assert elsewhere == [None]
    model.load_adapter(tmp_path / "two", "default")
    assert last_loaded_folder() == str(tmp_path / "two")
