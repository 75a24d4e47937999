"""Two ranks on the CPU by `accelerate launch` with each shipped configuration: they train as one process does."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from aslora_meft.cli import main
from tests.support import launched
from tests.support.processes import run_together

CONFIGS = Path(__file__).resolve().parents[2] / "examples" / "distributed"
METHODS = {"aslora": {"r": 8, "merge_start": 0, "merge_interval": 2}, "meft": {"r": 64}}
# MEFT by `accelerate launch` under DDP is in tests/aslora_meft/test_ranks.py.
RUNS = {"ddp": ["aslora"], "fsdp2": ["meft"], "deepspeed_zero2": ["aslora", "meft"]}


def words(method, model_dir, data, output, **fields):
    fields = METHODS[method] | {"method": method, "model": model_dir, "data": data, "output_dir": output} | fields
    fields |= {"max_length": 16, "max_steps": 4, "learning_rate": 1e-2, "max_grad_norm": 0.1, "adam_epsilon": 1e-3}
    fields |= {"per_device_train_batch_size": 2, "save_strategy": "no", "use_cpu": "true", "disable_tqdm": "true"}
    return ["train", *(str(word) for name, value in fields.items() for word in (f"--{name}", value))]


@pytest.mark.slow
@pytest.mark.parametrize(("config", "method"), [(name, method) for name in RUNS for method in RUNS[name]])
def test_ranks_of_a_configuration_train_as_one_process(config, method, model_dir, tmp_path):
    if config.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"{i} plus 1", "completion": f" {i + 1}"}) for i in range(40)))
    code, log = Path(launched.__file__).read_text(), tmp_path / "log"
    ranks = words(method, model_dir, data, tmp_path / "ranks", gradient_accumulation_steps=1)
    run_together(code, [([CONFIGS / f"{config}.yaml", tmp_path, *ranks], log)], 120, file=launched.__file__)
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


def test_configurations_differ_in_what_they_name_alone():
    found = {path.stem: yaml.safe_load(path.read_text()) for path in CONFIGS.glob("*.yaml")}
    assert found.keys() == RUNS.keys()
    kinds = {name: config.pop("distributed_type") for name, config in found.items()}
    assert kinds == {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED"}
    assert found["fsdp2"].pop("fsdp_config")["fsdp_version"] == 2
    assert found["deepspeed_zero2"].pop("deepspeed_config")["zero_stage"] == 2
    assert found["ddp"] == found["fsdp2"] == found["deepspeed_zero2"]
