"""The benchmark runs from end to end on toy sizes; its times mean nothing here."""

import json
import sys

import pytest
import torch

from benchmarks.meft_layer import __main__ as bench


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """Small sizes, one thread."""
    for name, value in (("D", 32), ("MAIN", (128, 16)), ("TOKENS", (1,)), ("NEURONS", (64,)), ("TOP_K", 8)):
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ASLORA_MEFT_THREADS", "1")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_rows_say_all_that_is_asked(tmp_path, monkeypatch, capsys):
    out = tmp_path / "meft_cpu.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--out", str(out)])
    assert bench.main() in (0, 1)
    result = json.loads(out.read_text())
    assert [(row["input"], row["r"], row["tokens"]) for row in result["rows"]] == [
        ("zipf", 128, 16), ("gaussian", 128, 16), ("zipf", 128, 1), ("gaussian", 128, 1), ("zipf", 64, 16),
        ("gaussian", 64, 16),
    ]  # fmt: skip
    for row in result["rows"]:
        assert row["times as fast"] > 0
        assert 0 < row["|U| / r"] <= 1
        assert all(set(times) == set(bench.PHASES) for times in row["milliseconds"].values())
    assert "|U|/r" in capsys.readouterr().out


def test_both_contestants_train(monkeypatch):
    """What is timed is a step: rows and weights move."""
    torch.manual_seed(0)
    layer = bench.sparse_layer(64)
    layer.requires_grad_(True)
    x = torch.randn(1, 4, 32)
    before = layer.tables("default")[0].rows.detach().clone()
    bench.sparse_step(layer)(x, torch.randn_like(x))
    assert not torch.equal(before, layer.tables("default")[0].rows)


def test_a_wrong_layer_is_not_reported():
    torch.manual_seed(0)
    layer = bench.sparse_layer(64)
    x = torch.randn(1, 64, 32)
    assert bench.check(layer, x) < 1e-5
    forward = layer.forward
    layer.forward = lambda x: forward(x) * 1.001
    with pytest.raises(SystemExit, match="nothing is reported"):
        bench.check(layer, x)


def test_zipf_tokens_repeat():
    x = bench.inputs("zipf", 256, torch.Generator().manual_seed(0))
    assert x.shape == (1, 256, 32)
    assert len(x[0].unique(dim=0)) < 250
    assert torch.equal(x, bench.inputs("zipf", 256, torch.Generator().manual_seed(0)))
