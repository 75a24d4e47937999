"""The replay of a trace through the choice of rows, with the bytes of its rows."""

import json

import numpy
import pytest
import torch

from benchmarks.hot_rows import __main__ as bench
from benchmarks.hot_rows.replay import replay

D = 10


def test_rows_that_every_step_uses_do_not_cross_once_they_have_places():
    used = torch.zeros(2, 6, 20, dtype=torch.bool)
    used[:, :, :5] = True  # 5 of 20 rows of each layer
    counts = replay(used, 0.25, D)
    assert counts.shares() == {
        "host-updated rows": 0.0,
        "row bytes": (3 * 2 * 15 * D * 2 + 3 * 10 * 4) / (3 * 2 * (20 * D * 2 + 5 * D * 6)),  # keys, and ids
        "swaps": 0.0,
    }
    assert replay(used, 0.0, D).shares()["host-updated rows"] == 1.0


def test_what_was_timed_is_not_timed_again_and_a_miss_shows(tmp_path, monkeypatch, capsys):
    trace, timed = tmp_path / "trace.npz", []
    used = numpy.zeros((2, 40, 64), dtype=bool)
    used[:, :, :8] = True
    numpy.savez(trace, used=numpy.packbits(used, axis=-1), r=64)
    monkeypatch.setattr(bench, "RESULT", tmp_path / "hot_rows.json")

    def seconds(used, run):
        if len(timed) == 5:
            raise KeyboardInterrupt
        timed.append((run["card"], run["micro-batches"], run["share"]))
        return [1.0 if run["share"] else 2.0] * 3

    monkeypatch.setattr(bench, "seconds", seconds)
    with pytest.raises(KeyboardInterrupt):
        bench.main(["--trace", str(trace)])
    monkeypatch.setattr(bench, "seconds", lambda used, run: timed.append(tuple(run.values())) or [3.0])
    assert bench.main(["--trace", str(trace)]) == 1  # with 16 micro-batches it takes longer than the 2 s without
    assert len(timed) == len(set(timed)) == len(bench.runs())
    assert "MISSED: 3090-like, 16 micro-batches" in capsys.readouterr().out
    kept = json.loads(bench.RESULT.read_text())
    assert len(kept["rows"]) == len(timed)
    assert kept["reached"]["3090-like: at least 1.6 times as fast"]
