"""Checkpoints tell of which task they are, and no other one goes on from them."""

import json

import pytest

from aslora_meft.cli import main
from aslora_meft.training.task_state import TaskState
from tests.support.task_models import LABELLED, PAIRS

ANSWERS = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]
RENAMED = [{**row, "label": {"good": "x", "bad": "y", "odd": "a"}[row["label"]]} for row in LABELLED]
FEWER = [row for row in LABELLED if row["label"] != "odd"]
SAVES = ["--save_strategy", "steps", "--save_steps", 1]
RESUME = ["--resume_from_checkpoint", "last", "--max_steps", 4]


@pytest.mark.parametrize(
    ("task", "rows", "other", "other_rows", "sentence"),
    [
        ("sft", ANSWERS, "dpo", PAIRS, "task=dpo differs from the checkpoint's task=sft; resume with that"),
        ("classification", LABELLED, "classification", RENAMED, "has the labels 'a', 'x', 'y' and the checkpoint's"),
        (
            "classification",
            LABELLED,
            "classification",
            FEWER,
            "has the labels 'bad', 'good' and the checkpoint's are 'b",
        ),
    ],
)
def test_another_task_or_other_labels(words, tmp_path, capsys, task, rows, other, other_rows, sentence):
    assert main(["train", *words(task, "llama", rows, *SAVES)]) == 0
    # Also into another folder, which is then not made.
    for resume in (
        RESUME,
        ["--resume_from_checkpoint", tmp_path / "out" / "checkpoint-2", "--output_dir", tmp_path / "x"],
    ):
        assert main(["train", *words(other, "llama", other_rows, *SAVES, *resume)]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("aslora-meft: error: ")
        assert sentence in error
    assert not (tmp_path / "x").exists()
    assert json.loads((tmp_path / "out" / "results.json").read_text())["task"] == task


def test_a_checkpoint_of_before_goes_on_and_its_successors_tell(words, tmp_path):
    assert main(["train", *words("classification", "bert", LABELLED, *SAVES)]) == 0
    for number in (1, 2):
        file = tmp_path / "out" / f"checkpoint-{number}" / "trainer_state.json"
        state = json.loads(file.read_text())
        kept = state["stateful_callbacks"].pop(TaskState.__name__)
        assert kept["args"] == {"task": "classification", "labels": ["bad", "good", "odd"]}
        file.write_text(json.dumps(state))
    assert main(["train", *words("classification", "bert", LABELLED, *SAVES, *RESUME)]) == 0
    state = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"][TaskState.__name__] == kept
