"""Ctrl-C in a run: a checkpoint, one line how to go on, exit code 130, and the same result in the end."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

from aslora_meft.cli import main


@pytest.fixture
def words(model_dir, text_file, tmp_path):
    def words(output, *more):
        run = ["train", "--model", model_dir, "--data", text_file, "--output_dir", tmp_path / output, "--r", 2]
        run += ["--max_length", 32, "--max_steps", 6, "--save_strategy", "no", "--use_cpu", "true"]
        return [str(word) for word in (*run, "--disable_tqdm", "true", *more)]

    return words


class Pressed(TrainerCallback):
    """Presses Ctrl-C while a step runs."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("method", ["aslora", "meft"])
def test_an_interrupted_run_goes_on_to_the_same_result(words, tmp_path, monkeypatch, capsys, method):
    more = ["--method", method, *(["--r", "16", "--top_k", "4"] if method == "meft" else [])]
    assert main(words("whole", *more)) == 0
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("transformers.trainer.DEFAULT_CALLBACKS", [*DEFAULT_CALLBACKS, Pressed(2)])
    capsys.readouterr()
    assert main(words("out", *more)) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("aslora-meft: stopped after step 3, which ")
    assert "--resume_from_checkpoint last" in last
    assert signal.getsignal(signal.SIGINT) is handler
    assert (tmp_path / "out" / "checkpoint-3" / "optimizer.pt").exists()
    monkeypatch.undo()
    assert main(words("out", *more, "--resume_from_checkpoint", "last")) == 0
    whole, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_ctrl_c_before_training_saves_nothing_and_says_so(words, tmp_path, monkeypatch, capsys):
    def pressed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("aslora_meft.tasks.sft.load_samples", pressed)
    assert main(words("out")) == 130
    assert capsys.readouterr().err.splitlines() == ["aslora-meft: interrupted; nothing was saved"]
    assert not (tmp_path / "out").exists()
