"""What an export reads and writes: the format, one tensor in memory at a time, all or nothing, refusals."""

import errno
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, GenerationConfig

from aslora_meft.cli import main
from aslora_meft.export import shards
from aslora_meft.export.meft_model import export_model
from aslora_meft.export.shards import Entry, write_model
from tests.support.exported_models import save_adapter, save_base


def test_tensors_of_each_kind_are_written_as_safetensors_reads_them(tmp_path):
    values = {
        "float64": torch.randn(3, dtype=torch.float64),
        "int64 scalar": torch.tensor(7),
        "bool": torch.tensor([True, False, True]),
        "bfloat16": torch.randn(2, 3).bfloat16(),
        "transposed": torch.randn(4, 5).T,
        "empty": torch.empty(0, 4),
        "uint8": torch.arange(5, dtype=torch.uint8),
    }
    entries = [Entry(name, list(v.shape), v.dtype, lambda v=v: v) for name, v in values.items()]
    write_model(tmp_path, entries)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def own_memory():  # bytes of this process that no file backs
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
def test_memory_is_that_of_a_tensor_and_not_of_the_model(tmp_path):
    sizes = {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 4096, "num_hidden_layers": 12}
    save_adapter(save_base(tmp_path / "base", **sizes), tmp_path / "adapter", r=4096, num_experts=64)
    export_model(tmp_path / "adapter", tmp_path / "first")  # imports
    base, peak, stop = own_memory(), [0], threading.Event()

    def look():
        while not stop.wait(0.002):
            peak[0] = max(peak[0], own_memory())

    looking = threading.Thread(target=look)
    looking.start()
    export_model(tmp_path / "adapter", tmp_path / "second", dtype="bfloat16")
    stop.set()
    looking.join()
    written = (tmp_path / "second" / "model.safetensors").stat().st_size
    assert written > 110e6
    assert peak[0] - base < 0.35 * written


def test_everything_that_a_server_needs_lies_in_the_folder(tmp_path, tokenizer):
    base = save_base(tmp_path / "base")
    GenerationConfig(max_new_tokens=5, eos_token_id=2).save_pretrained(base)
    tokenizer.save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    save_adapter(base, tmp_path / "adapter")
    results = {side: {"loss": 2.0, "perplexity": 7.4, "accuracy": 0.5} for side in ("before", "after")}
    (tmp_path / "adapter" / "results.json").write_text(json.dumps(results))
    export_model(tmp_path / "adapter", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "README.md"}
    assert GenerationConfig.from_pretrained(tmp_path / "out").max_new_tokens == 5
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template
    card = (tmp_path / "out" / "README.md").read_text()
    for part in ("license: apache-2.0", "trust_remote_code=True", "| top_k | 5 |", "| loss | 2 | 2 |", "vllm serve"):
        assert part in card
    assert str(tmp_path) not in card


@pytest.fixture
def saved(tmp_path):
    save_adapter(save_base(tmp_path / "base"), tmp_path / "adapter")
    return tmp_path


def refused(folder, match):
    with pytest.raises(ValueError, match=match) as raised:
        export_model(folder / "adapter", folder / "out")
    assert "\n" not in str(raised.value)
    assert not (folder / "out").exists()
    assert not list(folder.glob(".out*"))


def test_a_full_disk_leaves_nothing(saved, monkeypatch, capsys):
    def full(path, entries):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "_write", full)
    assert main(["export", str(saved / "adapter"), "--to", "model", str(saved / "out")]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "No space left" in told
    assert not (saved / "out").exists()
    assert not list(saved.glob(".out*"))


def test_a_folder_with_something_in_it_is_left_alone(saved):
    (saved / "full").mkdir()
    (saved / "full" / "mine").touch()
    with pytest.raises(ValueError, match="not empty"):
        export_model(saved / "adapter", saved / "full")
    assert [path.name for path in (saved / "full").iterdir()] == ["mine"]


def change_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_damaged_adapter_is_refused(saved):
    file = saved / "adapter" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    refused(saved, "digest")


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda base: shutil.rmtree(base), "is no folder here, and no model that the hub gives"),
        (lambda base: (base / "config.json").unlink(), r"holds no config\.json"),
        (lambda base: (base / "config.json").write_text("{"), "is damaged"),
        (lambda base: (base / "model.safetensors").unlink(), "save_pretrained"),
        (lambda base: (base / "model.safetensors").write_bytes(b"12345678"), "is damaged"),
        (lambda base: change_json(base / "config.json", quantization_config={"bits": 4}), "quantised"),
        (lambda base: change_json(base / "config.json", dtype="float64"), "use --dtype"),
        (lambda base: change_json(base / "config.json", num_hidden_layers=1), "does not have"),
        (lambda base: change_json(base / "config.json", num_hidden_layers=3), "have no 'model.layers.2"),
        (lambda base: change_json(base / "config.json", intermediate_size=50), r"by its config\.json"),
    ],
)
def test_a_base_model_that_cannot_be_read_is_refused(saved, spoil, match):
    spoil(saved / "base")
    refused(saved, match)


def test_a_missing_file_of_several_is_refused(saved):
    tensors = load_file(saved / "base" / "model.safetensors")
    (saved / "base" / "model.safetensors").unlink()
    save_file(tensors, saved / "base" / "one.safetensors")
    index = {"weight_map": {**dict.fromkeys(tensors, "one.safetensors"), "lm_head.weight": "two.safetensors"}}
    (saved / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(saved, r"lacks two\.safetensors")


def test_an_adapter_of_another_base_model_is_refused(tmp_path):
    save_adapter(save_base(tmp_path / "base"), tmp_path / "adapter")
    shutil.rmtree(tmp_path / "base")
    save_base(tmp_path / "base", hidden_size=64)
    refused(tmp_path, r"keys of 'model\.layers\.0\.mlp' have shape \(48, 32\) and not \(48, 64\)")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_families_that_are_not_known_are_refused(tmp_path, family):
    save_adapter(save_base(tmp_path / "base", family), tmp_path / "adapter")
    refused(tmp_path, f"model type '{family}' cannot be exported by --to model, which knows llama, mistral")


def test_other_tasks_are_refused(tmp_path):
    save_adapter(save_base(tmp_path / "base"), tmp_path / "adapter", task_type="FEATURE_EXTRACTION")
    refused(tmp_path, "task_type='FEATURE_EXTRACTION'")


def test_a_model_that_is_no_causal_one_is_refused(tmp_path):
    from peft import get_peft_model

    from meft import MEFTConfig

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(**sizes, num_hidden_layers=2)).save_pretrained(tmp_path / "base")
    base = BertForMaskedLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, MEFTConfig(r=48, num_experts=8, top_k=8)).save_pretrained(tmp_path / "adapter")
    refused(tmp_path, "model type 'bert' cannot be exported")
