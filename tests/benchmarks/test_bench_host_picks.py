"""The benchmark runs from end to end on toy sizes; its times mean nothing here."""

import json
import os

import pytest
import torch

from benchmarks.meft_layer import host_picks as bench

SIZE = (64, 48, 8, 3, 10)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    if bench.native_library() is None:
        pytest.skip("there was no compiler")
    monkeypatch.setattr(bench.whole_layer, "D", 48)
    monkeypatch.setenv(bench.VARIABLE, "1")  # put back afterwards: the benchmark sets it
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_rows_say_all_that_is_asked(tmp_path, capsys):
    out = tmp_path / "picks.json"
    assert bench.main(["--rounds", "2", "--threads", "2", "--out", str(out)], SIZE, (1, 5)) in (0, 1)
    (result,) = json.loads(out.read_text()).values()
    assert [row["tokens"] for row in result["in place"]] == [1, 5]
    assert [row["tokens"] for row in result["rows"]] == [1, 5]
    for row in result["rows"]:
        assert row["checks"]["picks"] > 0
        assert row["times as fast, 2 threads"]["median"] > 0
    assert "Gflop/s" in capsys.readouterr().out
    assert os.environ[bench.VARIABLE] in ("1", "2")


def test_wrong_picks_are_not_reported(monkeypatch):
    right = bench.pick
    monkeypatch.setattr(bench, "pick", lambda *given: [t.flip(1) if given[-1] is None else t for t in right(*given)])
    x, logits, keys = torch.randn(4, 48), torch.randn(4, 8), torch.randn(64, 48).to(torch.bfloat16)
    with pytest.raises(SystemExit, match="nothing is reported"):
        bench.check(x, logits, keys, SIZE)
