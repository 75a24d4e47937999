"""`aslora-meft count-rows`: counts that a training with `--train_rows` takes, and errors in one sentence."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from aslora_meft.cli import main
from tests.support.task_models import METHODS, SETTINGS


def words(*given):
    return [str(word) for word in given]


FIELDS = words(*METHODS["meft"])[2:]  # without --method


@pytest.fixture(scope="module")
def counted(model_dir, text_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("counts") / "counts.safetensors"
    given = words("count-rows", model_dir, "--data", text_file, "--output", path, "--max_length", 32, *FIELDS)
    assert main([*given, "--max_examples", "3"]) == 0
    return path


def test_a_training_with_the_same_seed_takes_the_counts_of_a_new_adapter(
    counted, model_dir, text_file, tmp_path, capsys
):
    counts = load_file(counted)
    with safe_open(counted, framework="pt") as file:
        assert (file.metadata()["examples"], file.metadata()["tokens"]) == ("3", "96")
    assert len(counts) == 8
    assert all(value.shape == (16,) and value.dtype == torch.int64 for value in counts.values())
    given = ["train", "--model", model_dir, "--data", text_file, *METHODS["meft"], *SETTINGS]
    given += ["--train_rows", json.dumps({"top": 2, "background": str(counted)})]
    out = tmp_path / "out"
    assert main(words(*given, "--output_dir", out, "--seed", 43)) == 2
    assert "counted with other routers than this adapter's" in capsys.readouterr().err
    assert not out.exists()
    assert main(words(*given, "--output_dir", out)) == 0
    # And a saved adapter can be counted itself.
    path = tmp_path / "again.safetensors"
    again = ["count-rows", out, "--data", text_file, "--output", path, "--max_length", 32, "--max_examples", 3]
    assert main(words(*again)) == 0
    assert f"Counts of 3 examples, 96 tokens: {path}" in capsys.readouterr().out
    found = load_file(path)
    assert found.keys() == counts.keys()
    assert any(not torch.equal(found[name], counts[name]) for name in counts)  # two steps of training later


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["{model}", "--output", "{tmp}"], "is a folder; give the name of a file"),
        (["{model}", "--output", "{tmp}/no/counts"], "does not exist; make it"),
        (["{model}", "--output", "{tmp}/c", "--max_examples", "0"], "max_examples=0"),
        (["{model}", "--output", "{tmp}/c", "--lora_alpha", "3"], "unknown argument '--lora_alpha'"),
        (["{adapter}", "--output", "{tmp}/c", "--r", "16"], "r is that of the adapter in"),
        (["{adapter}", "--output", "{tmp}/c"], "holds an adapter of type LORA, which has no rows"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(given, said, model_dir, text_file, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"], "base_model_name_or_path": str(model_dir)}
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    sizes = {"A": (1, 64), "B": (64, 1)}
    prefix = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    tensors = {prefix.format(i, part): torch.zeros(*shape) for i in range(4) for part, shape in sizes.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    filled = [word.format(model=model_dir, adapter=adapter, tmp=tmp_path) for word in given]
    assert main(["count-rows", *filled, "--data", str(text_file)]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert len(told.strip().splitlines()) == 1
    assert not (tmp_path / "c").exists()
