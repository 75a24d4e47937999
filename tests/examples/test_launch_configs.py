"""Two ranks on the CPU by `accelerate launch` with each shipped configuration: they train as one process does, and a
run under FSDP2 goes on from its checkpoints.
"""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from aslora_meft.cli import main
from aslora_meft.training.checkpoints import check_whole
from aslora_meft.training.task_state import ranks_of
from tests.support import launched
from tests.support.processes import run_together, saved_by_ranks
from tests.support.tiny_meft import Tiny

CONFIGS = Path(__file__).resolve().parents[2] / "examples" / "distributed"
METHODS = {"aslora": {"r": 8, "merge_start": 0, "merge_interval": 2}, "meft": {"r": 64}}
# MEFT by `accelerate launch` under DDP is in tests/aslora_meft/test_ranks.py.
IN_FILES = str.maketrans("~#=", "/*:")  # in the names of tensors
AS_TRAINED = ("shared_A", ".rows")  # what files hold as it was trained
RUNS = {"ddp": ["aslora"], "fsdp2": ["meft"], "deepspeed_zero2": ["aslora", "meft"]}


def words(method, model_dir, data, output, **fields):
    fields = METHODS[method] | {"method": method, "model": model_dir, "data": data, "output_dir": output} | fields
    fields |= {"max_length": 16, "max_steps": 4, "learning_rate": 1e-2, "max_grad_norm": 0.1, "adam_epsilon": 1e-3}
    fields = {"save_strategy": "no", "gradient_accumulation_steps": 1} | fields
    fields |= {"per_device_train_batch_size": 2, "use_cpu": "true", "disable_tqdm": "true"}
    return ["train", *(str(word) for name, value in fields.items() for word in (f"--{name}", value))]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{i} plus 1", "completion": f" {i + 1}"}) for i in range(40)))
    return path


def launch(config, folder, *commands):
    """Run commands one after the other in the same two ranks; of each rank what each has trained."""
    command, *others = commands
    words = [*command, *(word for other in others for word in ("then", *other))]
    code = Path(launched.__file__).read_text()
    run_together(code, [([config, folder, *words], folder / "log")], 120, file=launched.__file__)
    return [rank["runs"] for rank in saved_by_ranks(folder)]


@pytest.mark.slow
@pytest.mark.parametrize(("config", "method"), [(name, method) for name in RUNS for method in RUNS[name]])
def test_ranks_of_a_configuration_train_as_one_process(config, method, model_dir, data, tmp_path):
    if config.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    launch(CONFIGS / f"{config}.yaml", tmp_path, words(method, model_dir, data, tmp_path / "ranks"))
    assert main(words(method, model_dir, data, tmp_path / "one", gradient_accumulation_steps=2)) == 0
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ranks", "one"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if not name.endswith("digest"):
            torch.testing.assert_close(
                found[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
            )
    before, after = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("ranks", "one"))
    assert before["before"]["loss"] == pytest.approx(after["before"]["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "methods"), [("FULL_STATE_DICT", ["aslora"]), ("SHARDED_STATE_DICT", ["aslora", "meft"])]
)
def test_runs_under_fsdp2_go_on_bit_for_bit(kind, methods, model_dir, data, tmp_path):
    """From a checkpoint in the middle; at the end the first rank has written the adapter's file."""
    config = tmp_path / "fsdp2.yaml"
    shipped = (CONFIGS / "fsdp2.yaml").read_text()
    assert "fsdp_state_dict_type: FULL_STATE_DICT" in shipped
    config.write_text(shipped.replace("FULL_STATE_DICT", kind))
    commands = []
    for method in methods:
        saving = {"save_strategy": "steps", "save_steps": 2}
        resume = saving | {"resume_from_checkpoint": tmp_path / method / "checkpoint-2"}
        commands.append(words(method, model_dir, data, tmp_path / method, **saving))
        commands.append(words(method, model_dir, data, tmp_path / f"{method} resumed", **resume))
    ranks = launch(config, tmp_path, *commands)
    for number, method in enumerate(methods):
        for states in ranks:
            trained, resumed = (run["state"] for run in states[2 * number : 2 * number + 2])
            Tiny.assert_equal(trained, resumed)
        checkpoint = tmp_path / method / "checkpoint-2"
        check_whole(checkpoint)
        assert ranks_of(json.loads((checkpoint / "trainer_state.json").read_text())) == 2
        for name in ("adapter_model.safetensors", "README.md"):
            assert (checkpoint / name).exists() == (kind == "FULL_STATE_DICT")
        assert not (tmp_path / f"{method} resumed" / "checkpoint-2").exists()
        folders = tmp_path / method, tmp_path / f"{method} resumed"
        written, again = (load_file(folder / "adapter_model.safetensors") for folder in folders)
        Tiny.assert_equal(written, again)
        same = {n.replace(".default", "").translate(IN_FILES): n for n in trained if n.endswith(AS_TRAINED)}
        assert len(same) == {"aslora": 2, "meft": 8}[method]
        Tiny.assert_equal({name: written[name] for name in same}, {n: trained[was] for n, was in same.items()})


def test_configurations_differ_in_what_they_name_alone():
    found = {path.stem: yaml.safe_load(path.read_text()) for path in CONFIGS.glob("*.yaml")}
    assert found.keys() == RUNS.keys()
    kinds = {name: config.pop("distributed_type") for name, config in found.items()}
    assert kinds == {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED"}
    assert found["fsdp2"].pop("fsdp_config")["fsdp_version"] == 2
    assert found["deepspeed_zero2"].pop("deepspeed_config")["zero_stage"] == 2
    assert found["ddp"] == found["fsdp2"] == found["deepspeed_zero2"]
