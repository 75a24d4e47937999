"""The predictions run from end to end on few cells, and say that they are predictions."""

import json
import sys

import pytest

from benchmarks.step_bound import __main__ as bench
from meft.retrieval.strategies import DEVICE_STRATEGIES


@pytest.fixture
def few(monkeypatch):
    """Two shapes, two shares."""
    for name, value in (
        ("CARDS", ("3090",)),
        ("NEURONS", (6400,)),
        ("MICRO_BATCHES", ((2, 256),)),
        ("SHARES", (0.1, 1.0)),
    ):
        monkeypatch.setattr(bench, name, value)


def test_rows_and_table(few, tmp_path, monkeypatch, capsys):
    out = tmp_path / "model_24gb.json"
    monkeypatch.setattr(sys, "argv", ["model", "--out", str(out)])
    assert bench.main() == 0
    result = json.loads(out.read_text())
    assert result["kind"].startswith("PREDICTED")
    assert len(result["rows"]) == 2 * 2 * 2  # clipping, accumulation, shares
    for row in result["rows"]:
        assert row["kind"] == "PREDICTED"
        assert set(row["seconds at least"]) == set(DEVICE_STRATEGIES)
        assert all(0 < speed <= 1 for speed in row["of computing alone"].values())
        assert row["of computing alone"]["resident"] == 1
    table = out.with_suffix(".md").read_text()
    assert "PREDICTED, not measured" in table
    assert "## GeForce RTX 3090, r 6400" in table
    assert table.count("| 1 x 2x256 |") == 1
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 8
    assert all(line.startswith("PREDICTED 3090") for line in printed)


def test_quick_keeps_nothing(tmp_path, monkeypatch, capsys):
    out = tmp_path / "model_24gb.json"
    monkeypatch.setattr(sys, "argv", ["model", "--quick", "--out", str(out)])
    assert bench.main() == 0
    assert not out.exists()
    assert capsys.readouterr().out.count("PREDICTED") == len(bench.QUICK)


def test_traffic_of_the_paper_s_setting():
    """2 x 256, |U| = 0.26 r: rows both ways are 4 d |U| values for `host`; 1.7 GiB a step at r 6144, with the rest."""
    plan = bench.plan_of("host", 6144, 512, 0.26, 1)
    rows = [flow.elements for flow in plan.flows() if "rows" in flow.what or "row gradients" in flow.what]
    assert sum(rows) == 4 * 4096 * 1597
    assert 1.5 < plan.crossing() / 2**30 < 1.8


def test_the_kept_result_is_of_this_code():
    kept = json.loads(bench.RESULT.read_text())
    first, last = kept["rows"][0], kept["rows"][-1]
    assert first == bench.cell("3090", 3072, (1, 256), 0.1, 1, True)
    assert last == bench.cell("4090", 8464, (1, 2048), 1.0, 16, False)
    assert bench.RESULT.with_suffix(".md").read_text() == bench.markdown(kept["rows"])
