"""`evaluate` of other tasks than text: rows that do not fit the model, rows left out, and a table alone on stdout."""

import pytest

from aslora_meft.cli import main
from tests.support.task_models import PAIRS, write_rows

LONG = [{"text": f"word{i} " * 60, "label": "ab"[i % 2], "source": "a b " * 40, "target": "c " * 40} for i in range(8)]


@pytest.mark.parametrize(("task", "model"), [("classification", "bert"), ("seq2seq", "bart")])
def test_rows_that_the_model_has_no_places_for(run, tmp_path, capsys, task, model):
    targets = ["--target_modules", "q_proj", "v_proj"] if model == "bart" else []
    run(task, model, LONG, *targets)
    words = ["evaluate", str(tmp_path / "out"), "--data", str(tmp_path / "data.jsonl")]
    assert main([*words, "--max_length", "400"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("aslora-meft: error: max_length=")
    assert error.endswith(" is more than the model's 64; give at most that")


def test_pairs_that_are_left_out_are_told(run, tmp_path, capsys):
    pytest.importorskip("trl")
    rows = [*PAIRS, {"prompt": "say", "chosen": " yes" * 9, "rejected": " no"}]
    run("reward", "llama", PAIRS)
    data = write_rows(tmp_path / "more.jsonl", rows)
    words = ["evaluate", str(tmp_path / "out"), "--data", str(data)]
    capsys.readouterr()
    assert main([*words, "--max_length", "30"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["out"]  # nothing stands above the table
    assert lines[-1] == "(1 of 11 held-out rows are too long for max_length=30 and were left out)"
    assert sum("left out" in line for line in lines) == 1
    assert main([*words, "--max_length", "3"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "aslora-meft: error: max_length=3 leaves none of the 11 held-out rows; give more"
