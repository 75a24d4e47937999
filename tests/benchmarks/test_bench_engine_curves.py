"""What the benchmark keeps of three curves, and when it fails; the curves: tests/meft/test_engine_curves.py."""

import json
import sys

import pytest

from benchmarks.engine_curves import __main__ as bench

LOSSES = [4.0, 3.0, 3.5]


@pytest.fixture
def run(tmp_path, monkeypatch, one_thread):
    """Runs the benchmark with curves whose second losses differ from the engine's by these; code and result."""

    def run(same, own, *arguments):
        asked = []

        def smol(*args, **fields):
            asked.append((args, fields))
            return LOSSES, [4.0, 3.0 + same, 3.5], [4.0, 3.0 - own, 3.5]

        out = tmp_path / "engine_curves.json"
        monkeypatch.setattr(bench, "SMALL", tmp_path)
        monkeypatch.setattr(bench, "smol", smol)
        monkeypatch.setattr(sys, "argv", ["bench", "--out", str(out), *arguments])
        code = bench.main()
        ((args, fields),) = asked
        return code, json.loads(out.read_text()) if out.exists() else None, args, fields

    return run


def test_the_result_says_what_was_compared(run, capsys):
    code, result, args, fields = run(5e-6, 1e-3, "--steps", "3", "--r", "512", "--delay", "0.5")
    assert code == 0
    assert (args[0], args[1], args[2].longest, args[3]) == (3, "stream", 0.5, 64)
    assert fields["r"] == result["settings"]["r"] == 512
    assert fields["layers_to_transform"] is None  # all
    assert result["same picks"] == {"largest difference": pytest.approx(5e-6), "step": 1}
    assert result["own picks"]["largest difference"] == pytest.approx(1e-3)
    assert result["own picks"]["first step above the limit"] == 1
    assert result["losses"]["engine"] == LOSSES
    assert result["environment"]["threads"] >= 1
    assert "largest difference 5e-06" in capsys.readouterr().out


def test_it_fails_where_the_same_picks_give_other_losses(run):
    assert run(2e-5, 0.0)[0] == 1
    assert run(-2e-5, 0.0)[0] == 1
    code, result, *_ = run(0.0, 2e-5)
    assert code == 0
    assert result["own picks"]["first step above the limit"] == 1


def test_it_fails_where_a_loss_is_not_a_number(run):
    assert run(float("nan"), 0.0)[0] == 1


def test_a_quick_run_keeps_nothing(run):
    code, result, args, _ = run(0.0, 0.0, "--quick")
    assert (code, result, args[0]) == (0, None, 3)


def test_without_the_model_it_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "SMALL", tmp_path / "none")
    monkeypatch.setattr(sys, "argv", ["bench"])
    with pytest.raises(SystemExit, match="make demo"):
        bench.main()
