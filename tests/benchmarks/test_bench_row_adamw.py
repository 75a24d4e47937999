"""The benchmark's own arithmetic and book-keeping, on a tiny table."""

import json

import pytest
import torch

from benchmarks.meft_layer import row_adamw as bench

TINY = (24, 8, 16)


def test_a_run_writes_its_result_and_says_whether_the_limits_are_kept(tmp_path, capsys):
    code = bench.main(["--rounds", "3", "--out", str(tmp_path / "new" / "result.json")], size=TINY)
    result = json.loads((tmp_path / "new" / "result.json").read_text())
    assert result["settings"] == {
        "rows": 24, "touched rows": 8, "values of a row": 16, "dtype": "float32", "rounds": 3
    }  # fmt: skip
    assert set(result["steps"]) >= {bench.OWN_TORCH, bench.FUSED, bench.SPARSE, bench.WHOLE, result["ours"]}
    for row in result["steps"].values():
        assert row["ms"]["fastest"] <= row["ms"]["25 %"] <= row["ms"]["median"] <= row["ms"]["75 %"]
    text, within = bench.report(result)
    assert text == capsys.readouterr().out.rstrip("\n")
    assert code == (0 if within else 1)


def test_a_quick_run_keeps_no_result(tmp_path):
    bench.main(["--quick", "--out", str(tmp_path / "result.json")], size=TINY)
    assert not list(tmp_path.iterdir())


def test_the_committed_result_has_the_size_that_the_limits_are_about():
    settings = json.loads(bench.RESULT.read_text())["settings"]
    assert (settings["rows"], settings["touched rows"], settings["values of a row"]) == bench.SIZE


@pytest.mark.parametrize(("share", "kept"), [(0.8, True), (0.79, False)])
def test_limits_on_both_sides(share, kept):
    result = {
        "ours": "C++",
        "steps": {},
        "bandwidth beside fused on contiguous rows": {"median": share, "interval": (0.7, 0.9)},
        "times as fast as SparseAdam": {"median": 20.0, "interval": (19.0, 21.0)},
    }
    text, within = bench.report(result)
    assert within is kept
    assert text.count("NOT kept") == (0 if kept else 1)


def test_ratios_are_of_rounds():
    found = bench.ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0])
    assert found["median"] == 3.0
    assert found["interval"][0] >= 2.0
    assert found["interval"][1] <= 4.0


@pytest.mark.parametrize("fault", ["another row", "a wrong step"])
def test_a_wrong_update_is_found_before_any_time(monkeypatch, fault):
    update = bench.update_rows

    def wrong(state, *others, **settings):
        update(state, *others, **settings)
        if fault == "another row":
            state.table[0] += 1
        else:
            state.table[1] *= 1.001

    monkeypatch.setattr(bench, "update_rows", wrong)
    with pytest.raises(SystemExit, match="nothing is reported"):
        bench.check(torch.randn(4, 8), torch.tensor([1, 2]), torch.randn(2, 8))
