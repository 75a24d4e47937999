"""Writes that fail while a run or an export saves: one sentence, exit code 2, and nothing half-written."""

import errno
import os
import resource

import pytest
from peft import get_peft_model
from safetensors import SafetensorError
from transformers import LlamaForCausalLM

from aslora import ASLoRAConfig
from aslora_meft.cli import main
from aslora_meft.training.checkpoints import check_whole
from aslora_meft.training.failed_writes import write_failure
from aslora_meft.training.interrupt import StopAtStep
from meft import MEFTConfig


@pytest.fixture
def file_size():
    """Sets the most bytes that a file may have, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Too large are at first the adapter's configuration, the tokenizer, and the optimizer's state.
@pytest.mark.parametrize(("size", "saved"), [(100, []), (8000, []), (12000, [2])])
def test_a_run_that_cannot_save(model_dir, text_file, tmp_path, monkeypatch, capsys, file_size, size, saved):
    later = StopAtStep.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        later(self, args, state, control, **kwargs)
        if state.global_step > len(saved) * 2:
            file_size(size)

    monkeypatch.setattr(StopAtStep, "on_step_end", on_step_end)
    words = ["--model", model_dir, "--data", text_file, "--output_dir", tmp_path / "out", "--use_cpu", "true"]
    words += ["--max_length", 32, "--max_steps", 5, "--save_steps", 2, "--report_to", "none", "--disable_tqdm", "true"]
    words += ["--method", "meft", "--r", 64, "--top_k", 4, "--num_experts", 4, "--experts_per_token", 2]
    assert main(["train", *map(str, words)]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"aslora-meft: error: output_dir='{tmp_path / 'out'}' cannot be written: ")
    assert ("checkpoint-2 is whole" in told) == bool(saved)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"checkpoint-{step}" for step in saved]
    for step in saved:
        check_whole(tmp_path / "out" / f"checkpoint-{step}")


@pytest.mark.parametrize("form", ["lora", "merged", "model", "dense"])
def test_an_export_that_cannot_write(model_dir, tmp_path, capsys, file_size, form):
    config = (
        ASLoRAConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        if form in ("lora", "merged")
        else MEFTConfig(r=16, top_k=16, num_experts=4, experts_per_token=4, router_factor=False, task_type="CAUSAL_LM")
    )
    get_peft_model(LlamaForCausalLM.from_pretrained(model_dir), config).save_pretrained(tmp_path / "adapter")
    file_size(1000)
    assert main(["export", str(tmp_path / "adapter"), "--to", form, str(tmp_path / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), os.strerror(errno.ENOSPC)),
        (SafetensorError("Error while serializing: I/O error: x (os error 28)"), os.strerror(errno.ENOSPC)),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), "the disk is full"),
        (RuntimeError("shapes do not fit"), None),
        (ConnectionError("no route"), None),
    ],
)
def test_which_errors_are_failed_writes(error, why):
    found = write_failure(error)
    assert found is None if why is None else found.startswith(why)
