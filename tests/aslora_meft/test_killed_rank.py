"""A rank of `torchrun` that is killed in a step, or while a checkpoint is written: the others end with one sentence,
and the last whole checkpoint is the one to go on from.
"""

import os
import re
from pathlib import Path

import pytest
import torch.distributed as dist

from aslora_meft.arguments.groups import parse_train
from aslora_meft.train import train
from aslora_meft.training.checkpoints import checkpoint_to_resume
from aslora_meft.training.ranks import lost_ranks_in_one_sentence
from meft.transport.shared_memory import VARIABLE
from tests.support import launched
from tests.support.processes import run_together


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:17843."),
        dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:3356, remote process exited or network error"),
        RuntimeError("Rank 1 of this node (process 7), which shares MEFT's rows with this one, has ended: see"),
    ],
    ids=["gloo", "nccl", "shared rows"],
)
def test_lost_ranks_are_one_sentence(error, monkeypatch, capsys):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(SystemExit, match=r"^2$"), lost_ranks_in_one_sentence():
        raise error
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"error: rank 0 has lost another rank of the run: .*--resume_from_checkpoint last", line)
    assert str(error)[:20] in line


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error"), dist.DistBackendError("NCCL error: Duplicate GPU detected")], ids=str
)
def test_other_errors_stay_as_they_are(error):
    with pytest.raises(RuntimeError) as raised, lost_ranks_in_one_sentence():
        raise error
    assert raised.value is error


@pytest.fixture
def words(model_dir, text_file, tmp_path):
    """A run with a checkpoint every second step."""

    def words(method, steps):
        words = ["--model", model_dir, "--data", text_file, "--output_dir", tmp_path / "out", "--method", method]
        words += ["--r", 64 if method == "meft" else 4, "--max_length", 16, "--save_strategy", "steps"]
        words += ["--max_steps", steps, "--save_steps", 2, "--per_device_train_batch_size", 2]
        return [str(word) for word in (*words, "--disable_tqdm", "true", "--use_cpu", "true")]

    return words


def run_with_a_killed_rank(words, folder, killed):
    """What two ranks have said, and the sentences in which those that were not killed have ended."""
    code, log = Path(launched.__file__).read_text(), folder / "log"
    run_together(code, [(["torchrun", folder, "train", *words], log)], 60, file=launched.__file__, ends=[1])
    said = log.read_text()
    assert f"(local_rank: {killed})\n  exitcode  : -9" in said  # torchrun names the one that ended first
    errors = [line for line in said.splitlines() if line.startswith("aslora-meft: error: ")]
    assert all(f"rank {1 - killed} has lost another rank of the run" in error for error in errors)
    assert len(errors) == said.count("aslora-meft: error") <= 1
    assert "aslora_meft/train.py" not in said  # no page of calls, but for torchrun's own
    return errors


@pytest.mark.slow
@pytest.mark.parametrize("method", ["aslora", "meft"])
def test_the_others_end_at_once_and_the_run_goes_on(method, words, tmp_path, monkeypatch):
    monkeypatch.setenv("KILLED_AT", "4")
    monkeypatch.setenv(VARIABLE, "1")  # MEFT's ranks wait for each other in shared memory
    # torchrun ends the other one, unless that has found out by itself.
    run_with_a_killed_rank(words(method, 4), tmp_path, 1)
    assert not (tmp_path / "out" / "checkpoint-4").exists()
    monkeypatch.delenv(VARIABLE)
    train(parse_train([*words(method, 4), "--resume_from_checkpoint", "last"]))
    assert (tmp_path / "out" / "checkpoint-4").exists()
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="a rank waits for the end of the other one")
@pytest.mark.parametrize(("method", "killed"), [("aslora", 0), ("meft", 1)])
def test_a_checkpoint_that_is_being_written_is_never_taken(method, killed, words, tmp_path, monkeypatch):
    """Nor does the one before go, of which only one is to be kept, while a rank has not written its part."""
    monkeypatch.setenv("KILLED_IN_SAVE", str(killed))
    errors = run_with_a_killed_rank([*words(method, 6), "--save_total_limit", "1"], tmp_path, killed)
    found, passed = checkpoint_to_resume("last", tmp_path / "out")
    assert found == tmp_path / "out" / "checkpoint-2"
    (unfinished,) = passed
    assert unfinished == tmp_path / "out" / "checkpoint-4"
    assert passed[unfinished] == "trainer_state.json is missing"
    if killed == 1:  # the first rank has written its part, and then missed the other one
        assert len(errors) == 1
        assert (unfinished / "rng_state_0.pth").exists()
