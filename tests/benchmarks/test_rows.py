"""The file of a benchmark's rows: which a rerun finds, and which a new one replaces."""

import json

from benchmarks.common.rows import Rows

KEY = {"task": "reviews", "method": "LoRA r 8", "seed": 0, "split": "test", "learning_rate": 1e-3}


def test_a_rerun_finds_its_row_and_only_with_equal_settings(tmp_path):
    rows = Rows(tmp_path / "rows.json")
    assert rows.find(KEY, {"steps": 4}) is None
    rows.add(KEY | {"settings": {"steps": 4, "pair": (1, 2)}, "loss": 1.0}, {"torch": "a"})
    again = Rows(tmp_path / "rows.json")
    assert again.find(KEY, {"steps": 4, "pair": (1, 2)})["loss"] == 1.0
    assert again.find(KEY, {"steps": 5, "pair": (1, 2)}) is None
    assert again.find(KEY | {"seed": 1}, {"steps": 4, "pair": (1, 2)}) is None


def test_a_row_takes_the_place_of_one_of_the_same_run_and_of_no_other(tmp_path):
    rows = Rows(tmp_path / "rows.json")
    rows.add(KEY | {"settings": {"steps": 5}}, {"torch": "a"})
    rows.add(KEY | {"settings": {"steps": 4}}, {"torch": "a"})  # e.g. of another model
    rows.add(KEY | {"settings": {"steps": 5}, "learning_rate": 1e-2}, {"torch": "b"})
    for rate in (1e-3, 1e-2, 1e-2):
        rows.add(KEY | {"settings": {}, "split": "valid", "learning_rate": rate}, {"torch": "a"})
    content = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["split"], row["learning_rate"]) for row in content["rows"]] == [
        ("test", KEY["learning_rate"]), ("test", 1e-2), ("valid", 1e-3), ("valid", 1e-2)
    ]  # fmt: skip
    assert content["environments"] == [{"torch": "a"}, {"torch": "b"}]
    assert [content["environments"][row["environment"]]["torch"] for row in content["rows"]] == ["a", "b", "a", "a"]
