"""The rows of `benchmarks.peer_optimizers` on small sizes, and its checks, which can fail."""

import pytest
import torch

from benchmarks.peer_optimizers import dense, layer, value_side
from benchmarks.peer_optimizers.rounds import in_turn, summary


def test_ratios_are_of_the_rounds():
    times = {"a": [{"x": 1.0, "y": 1.0}, {"x": 2.0, "y": 2.0}], "b": [{"x": 3.0, "y": 3.0}, {"x": 2.0, "y": 2.0}]}
    found = summary(times, "a")
    assert found["b"]["times as long as MEFT"] == 2.0  # of 3 and 1
    assert found["b"]["ms"] == {"x": 2500.0, "y": 2500.0}
    steps = {name: lambda: {"x": 1.0} for name in "abc"}
    assert {name: len(rows) for name, rows in in_turn(steps, 4).items()} == dict.fromkeys("abc", 4)


def test_value_side(monkeypatch):
    monkeypatch.setattr(value_side, "fbgemm_table", lambda *_: (_ for _ in ()).throw(dense.MissingError("absent")))
    row = value_side.measure(r=64, d=32, tokens=8, top_k=4, rounds=1)
    assert set(row["steps"]) == {value_side.MEFT, value_side.BAG}
    assert row["not run"] == dict.fromkeys(value_side.FBGEMM, "absent")
    assert max(row["checks"].values()) < 1e-5


def test_a_wrong_gradient_ends_the_run(monkeypatch):
    right = value_side.our_gradient
    monkeypatch.setattr(value_side, "our_gradient", lambda *a: (*right(*a)[:2], right(*a)[2] * 1.01))
    values = torch.randn(64, 32)
    with pytest.raises(SystemExit, match="gradient, EmbeddingBag"):
        value_side.check(values, value_side.Picks(64, 32, 8, 4))


def test_layer_counts_bytes(monkeypatch):
    monkeypatch.setattr(layer, "D", 256)
    monkeypatch.setattr(layer, "inputs", lambda kind, tokens, generator: torch.randn(1, tokens, 256))
    monkeypatch.setattr(layer, "OPTIMIZERS", ("torch AdamW, fused", "torchao CPUOffloadOptimizer"))
    row = layer.measure(r=256, tokens=16, rounds=1)
    plain, narrow = row["steps"][layer.MEFT], row["steps"][layer.NARROW]
    values = 2 * 256 * 256
    assert row["steps"]["torch AdamW, fused"]["MiB kept"] == round((16 * values + 8) / 2**20, 1)
    assert narrow["MiB kept"] < plain["MiB kept"] / 1.5
    assert set(row["not run"]) <= {"torchao CPUOffloadOptimizer"}


def test_an_optimizer_that_steps_otherwise_ends_the_run(monkeypatch):
    monkeypatch.setattr(dense, "optimizer", lambda name, parameters: torch.optim.SGD(parameters, lr=dense.RATE))
    with pytest.raises(SystemExit, match="is off by"):
        dense.check_step("torch AdamW, fused")
