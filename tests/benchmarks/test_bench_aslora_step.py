"""The benchmark runs from end to end on a toy model; its times mean nothing here."""

import json

import pytest
import torch

from benchmarks.aslora_step import __main__ as bench


@pytest.fixture(autouse=True)
def one_thread():
    """Toy matrices take longer on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def result(tmp_path, capsys):
    """The result file of a run of all rows of the toy model, and what was printed."""
    out = tmp_path / "results" / "aslora_step.json"
    assert bench.main(["--pairs", "3", "--out", str(out)], models=[bench.TOY]) in (0, 1)
    return out, capsys.readouterr().out


def test_a_row_says_all_that_is_asked(result):
    out, printed = result
    content = json.loads(out.read_text())
    assert [(row["model"], row["targets"]) for row in content["rows"]] == [
        ("toy", "q,v"),
        ("toy", "all-linear"),
        ("toy", bench.JOINT),
    ]
    assert set(content["environments"][0]) >= {"processor", "threads", "torch", "peft", "transformers", "aslora-meft"}
    for row in content["rows"]:
        low, high = row["step ratio interval"]
        assert 0 < low <= row["step ratio"] <= high
        # q: 4 x 32 x 4 + 4 x 32 values a projection; Adam keeps two values for each.
        ours, lora = row["aslora bytes at the end"], row["lora bytes"]
        assert ours["parameters"] < lora["parameters"]
        assert 2 * ours["parameters"] <= ours["optimizer state"] <= 2 * ours["parameters"] + 1000
        assert ours["file"] < row["aslora bytes while merges are pending"]["file"]
        assert ours["file"] <= row["aslora file limit at the end"]
    assert content["rows"][0]["aslora live values"] == {
        "start": 2 * (4 * 32 + 4 * 32 * 4),
        "now": 2 * (4 * 32 + 1 * 32 * 4),
        "end": 2 * (4 * 32 + 1 * 32 * 4),
    }
    joint = content["rows"][2]
    # One A for the five projections: 4 x 32 values, and a B each for 4 layers.
    assert joint["aslora live values"]["start"] == 4 * 32 + 4 * 4 * (3 * 32 + 2 * 48)
    assert 0 < joint["base ratio interval"][0] <= joint["base ratio"]
    # Of q, k, v, gate and up LoRA keeps a product of 8 tokens with A each, ASLoRA one for three and one for two.
    assert 0 < joint["aslora peak activations"] < joint["lora peak activations"]
    assert printed.count("x LoRA [") == 3
    assert printed.count("base alone") == printed.count("peak activations") == 1


def test_a_second_run_measures_nothing_anew(result, monkeypatch):
    out, _ = result
    before = out.read_text()
    monkeypatch.setattr(bench, "measure", None)
    bench.main(["--pairs", "3", "--out", str(out)], models=[bench.TOY])
    assert out.read_text() == before


def test_a_wrong_loss_is_reported_instead_of_times(tmp_path, monkeypatch):
    broken = bench.Contestant.loss
    calls = iter(range(100))
    monkeypatch.setattr(bench.Contestant, "loss", lambda self: broken(self) + next(calls))
    with pytest.raises(SystemExit, match=r"check failed.*at B = 0"):
        bench.main(["--pairs", "2", "--out", str(tmp_path / "out.json")], models=[bench.TOY])
    assert not (tmp_path / "out.json").exists()


def test_the_interval_is_that_of_the_median():
    assert bench.interval([1.0] * 5) == (1.0, 1.0)
    low, high = bench.interval([1.0, 2.0, 3.0, 4.0, 100.0])
    assert 1.0 <= low <= 3.0 <= high <= 100.0
