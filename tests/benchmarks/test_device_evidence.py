"""Models that are carried in few bits, and what `device_evidence.py` does without them."""

import json

import pytest
import torch
import transformers as tr
from safetensors.torch import load_file, save_file

from benchmarks import device_evidence, ingest_device
from benchmarks.aslora_classify.runs import read_settings as classify_settings
from benchmarks.aslora_classify.training import steps_of
from benchmarks.common.comparisons import read_list
from benchmarks.language.carried_model import MOST, carry_in_bfloat16, carry_in_parts, pack, rounded, unpack, unpacked
from benchmarks.meft_facts.training import read_settings as facts_settings
from tests.support.models import model


def test_codes_are_packed_without_loss():
    codes = torch.arange(64, dtype=torch.uint8).repeat(3)
    assert len(pack(codes)) == 3 * len(codes) // 4
    assert torch.equal(unpack(pack(codes)), codes)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model(tr.LlamaForCausalLM, vocab_size=96, hidden_size=64).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_model_in_two_parts(tiny_model, tmp_path):
    parts = [tmp_path / "0", tmp_path / "1"]
    carry_in_parts(tiny_model, parts)
    sizes = [(part / "part.z").stat().st_size for part in parts]
    assert max(sizes) < 1.3 * min(sizes)
    target = unpacked(parts, tmp_path / "whole")
    exact, found = load_file(tiny_model / "model.safetensors"), load_file(target / "model.safetensors")
    assert found.keys() == exact.keys()
    for name, tensor in exact.items():
        if tensor.ndim < 2:
            assert torch.equal(found[name], tensor.bfloat16())
            continue
        _, scales = rounded(tensor)
        error = (found[name].float() - tensor).view(-1, 64).abs().amax(1)
        # Half a step, bfloat16's rounding and float16's of the scale.
        assert bool((error <= scales.float() * (0.5 + MOST * (2**-8 + 2**-10))).all()), name
    tr.AutoModelForCausalLM.from_pretrained(target)
    (parts[1] / "part.z").unlink()
    with pytest.raises(FileNotFoundError):
        unpacked(parts, tmp_path / "other")


def test_a_model_in_bfloat16_keeps_whole_numbers(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"w": torch.full((2, 2), 0.3), "ids": torch.arange(3)}, tmp_path / "model.safetensors")
    carry_in_bfloat16(tmp_path, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found["ids"].dtype == torch.int64
    assert torch.equal(found["w"], torch.full((2, 2), 0.3).bfloat16())
    assert (tmp_path / "out" / "config.json").exists()


def test_what_was_not_carried_is_not_run(tmp_path, capsys):
    assert device_evidence.main(["--carried", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out
    assert "aslora_classify: not run: banking77 is not in" in said
    assert "meft_facts: not run: nq_open is not in" in said
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "meft_routing: not run: wikitext2 is not in" in said
    assert [part["status"] for part in results["parts"]] == ["not carried"] * 3


def test_rows_name_no_folder_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(device_evidence, "TABLES", {})
    out = tmp_path / "out"
    out.mkdir()
    models = [str(tmp_path / "minilm"), str(out / "work" / "smollm2")]
    (out / "meft_facts_device.json").write_text(json.dumps(models))
    device_evidence.main(["--carried", str(tmp_path), "--out", str(out)])
    files = json.loads((out / "results.json").read_text())["files"]
    assert json.loads(files["meft_facts_device.json"]) == ["minilm", "smollm2"]


def test_settings_name_the_carried_model(tmp_path):
    for module, read in (("aslora_classify", classify_settings), ("meft_facts", facts_settings)):
        for rehearse in (False, True):
            path = device_evidence.settings_of(module, tmp_path / "m", tmp_path, rehearse)
            settings = read(path)
            assert settings.setup.model == str(tmp_path / "m")
            names = {method.name for method in settings.methods}
            listed = read_list(settings.comparisons)
            assert rehearse or {name for pair in listed.pairs for name in pair} <= names
            assert rehearse or set(listed.tasks) == {task.name for task in settings.tasks}
            assert len(settings.tasks) == 1 or not rehearse
            for task in settings.tasks:  # of one step the rate is 0: all rates are equal then, and none is chosen
                steps = steps_of(task, 16) if module == "aslora_classify" else settings.setup.recall(task).steps
                assert steps > 1


def test_rows_and_pages_are_ingested(tmp_path):
    results = {
        "version": 1, "evidence": True, "rehearsal": False, "began": "2030-01-02",
        "source": {"digest": "", "commit": ""}, "machine": {"gpu": "NVIDIA X9"}, "parts": [], "findings": [],
        "files": {f"{name}_device.json": '{"environments": [], "rows": []}' for name in ("meft_facts", "meft_routing")},
    }  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert ingest_device.main([str(tmp_path / "results.json"), "--out", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "device_nvidia_x9_meft_facts.json", "device_nvidia_x9_meft_facts.md",
        "device_nvidia_x9_meft_routing.json", "device_nvidia_x9_meft_routing.md",
    }  # fmt: skip
    page = (tmp_path / "out" / "device_nvidia_x9_meft_facts.md").read_text()
    assert "3,610 facts x 20: MEFT r 4096, seed 2000, 2001, 2002, 2003, 2004: not measured" in page
