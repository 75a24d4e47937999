"""Writes that fail while a run or an export saves: one sentence, exit code 2, and nothing half-written."""

import errno
import os
import resource
from pathlib import Path

import pytest
from peft import get_peft_model
from safetensors import SafetensorError
from transformers import LlamaForCausalLM, Trainer

from aslora import ASLoRAConfig
from aslora_meft.cli import main
from aslora_meft.tasks import heads
from aslora_meft.training import finish
from aslora_meft.training.checkpoints import check_whole
from aslora_meft.training.failed_writes import RunFolder, write_failure
from aslora_meft.training.interrupt import StopAtStep
from aslora_meft.training.run_record import RECORD, RunRecord
from meft import MEFTConfig
from tests.support.task_models import LABELLED

ANSWERS = [{"prompt": f"say {i}", "completion": f"yes {i}"} for i in range(12)]


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


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_at_the_end(self, output_dir=None, _internal_call=False, save=Trainer.save_model):
    """`Trainer.save_model`: checkpoints fit, the adapter does not."""
    if output_dir is None:
        Path(self.args.output_dir, "tokenizer.json").touch()
        full()
    save(self, output_dir, _internal_call)


def told(capsys):
    return capsys.readouterr().err.splitlines()[-1]


# Of a classifier: the adapter, and the configuration that tells how large its head is.
@pytest.mark.parametrize(
    "failing",
    [(Trainer, "save_model", full_at_the_end), (heads, "replace_file", full)],
    ids=["adapter", "config.json"],
)
def test_where_nothing_was_saved_the_same_command_runs_again(words, tmp_path, monkeypatch, capsys, failing):
    pytest.importorskip("tensorboard")
    command = ["train", *words("classification", "bert", LABELLED, "--report_to", "tensorboard")]
    with monkeypatch.context() as patch:
        patch.setattr(*failing)
        assert main(command) == 2
    reason = os.strerror(errno.ENOSPC)
    remedy = "nothing was saved, free the disk and run the same command again"
    assert told(capsys) == f"aslora-meft: error: output_dir='{tmp_path / 'out'}' cannot be written: {reason}; {remedy}"
    assert not any((tmp_path / "out").iterdir())
    assert main(command) == 0


@pytest.mark.parametrize(
    "failing", [(Trainer, "save_model", full_at_the_end), (finish, "replace_file", full)], ids=["adapter", "results"]
)
def test_where_a_checkpoint_is_whole_the_run_goes_on_from_it(words, tmp_path, monkeypatch, capsys, failing):
    command = ["train", *words("sft", "llama", ANSWERS, "--save_strategy", "steps", "--save_steps", 1)]
    with monkeypatch.context() as patch:
        patch.setattr(*failing)
        assert main(command) == 2
    assert told(capsys).endswith("free the disk and run the same command with --resume_from_checkpoint last")
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"checkpoint-1", "checkpoint-2", RECORD} <= there
    assert ("adapter_model.safetensors" in there) == ("tokenizer.json" in there) == (failing[0] is finish)
    assert main([*command, "--resume_from_checkpoint", "last"]) == 0
    assert (tmp_path / "out" / "results.json").is_file()


def test_an_adapter_that_is_saved_is_told(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(finish, "replace_file", full)
    assert main(["train", *words("sft", "llama", ANSWERS)]) == 2
    assert "; the adapter is saved, and results.json or the model card is not: to have them, free" in told(capsys)
    monkeypatch.undo()
    assert main(["generate", str(tmp_path / "out"), "--prompt", "say", "--max_new_tokens", "1"]) == 0


def test_an_error_that_is_no_failed_write_removes_nothing(tmp_path):
    folder = RunFolder(str(tmp_path))
    (tmp_path / "new").touch()
    with pytest.raises(RuntimeError, match="another error"), folder.nothing_half_written():
        raise handled(of_file(errno.ENOENT, tmp_path / "cc"), suppress=True)
    assert (tmp_path / "new").exists()


def test_a_record_of_which_a_line_could_not_be_written_ends_with_a_line(tmp_path, file_size):
    record = RunRecord()
    record._path = tmp_path / RECORD
    record._waiting = [{"step": 1}]
    record._write()
    whole = record._path.read_text()
    record._waiting = [{"step": 2, "values": "x" * 500}]
    file_size(100)
    with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
        record._write()
    assert record._path.read_text() == whole


def of_file(code, path):
    return OSError(code, os.strerror(code), path)


def handled(error, suppress):
    """An error that was raised while another one was handled."""
    found = RuntimeError("another error")
    found.__context__, found.__suppress_context__ = error, suppress
    return found


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), os.strerror(errno.ENOSPC)),
        (SafetensorError("Error while serializing: I/O error: x (os error 28)"), os.strerror(errno.ENOSPC)),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), "the disk is full"),
        (RuntimeError("shapes do not fit"), None),
        (ConnectionError("no route"), None),
        (of_file(errno.EACCES, "out/checkpoint-1"), os.strerror(errno.EACCES)),
        (of_file(errno.ENOENT, b"out/file"), os.strerror(errno.ENOENT)),
        (of_file(errno.ENOENT, "/usr/bin/cc"), None),
        (of_file(errno.ENOSPC, "/elsewhere/cache"), None),
        (OSError(errno.EPERM, "Operation not permitted"), None),
        (SafetensorError("Error while serializing: I/O error: x (os error 13)"), os.strerror(errno.EACCES)),
        (RuntimeError("No such file or directory (os error 2)"), None),
        (handled(OSError(errno.ENOSPC, "x"), suppress=False), os.strerror(errno.ENOSPC)),
        (handled(OSError(errno.ENOSPC, "x"), suppress=True), None),
    ],
)
def test_which_errors_are_failed_writes(error, why):
    found = write_failure(error, Path("out"))
    assert found is None if why is None else found.startswith(why)
