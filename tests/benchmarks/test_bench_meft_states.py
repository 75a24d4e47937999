"""The benchmark of narrower masters and moments: its verdicts, its runs on a tiny model, its kept page."""

import json

import pytest
import torch

from benchmarks.common.places import RESULTS
from benchmarks.common.rows import Rows
from benchmarks.language.facts import Recall, load_pairs
from benchmarks.meft_states import __main__ as states
from benchmarks.meft_states import runs
from tests.support.facts import QUESTIONS, Letters, tiny, write_questions


def test_ways_to_keep_states_are_compared_with_float32_seed_by_seed():
    exact, other = states.WAYS[0].name, states.WAYS[1].name
    keys = {"task": states.TASK.name, "split": "test", "exact_match": 0.5}
    chance = torch.randn(8, generator=torch.Generator().manual_seed(0)).tolist()

    def page(ratio, spread):
        rows = [keys | {"method": exact, "seed": seed, "train_loss": float(seed)} for seed in states.SEEDS]
        rows += [
            keys | {"method": other, "seed": seed, "train_loss": seed * (ratio + spread * noise)}
            for seed, noise in zip(states.SEEDS, chance, strict=True)
        ]
        line = next(
            line for line in states.text(rows, states.TASK, False).splitlines() if line.startswith(f"| {other}")
        )
        return line.split(" | ")[-1].removesuffix(" |")

    assert page(1.001, 0.001) == "equal"
    assert page(1.05, 0.01) == "different"
    assert page(1.0, 0.1) == "undecided"
    assert page(1.08, 0.06) == "undecided"  # p 0.04, but of seven comparisons
    assert f"| {states.WAYS[2].name} | missing | | | | |" in states.text([], states.TASK, True)


def test_each_way_makes_a_model():
    for way in states.WAYS:
        model = way.attach(tiny())
        assert {table.mode for table in model.base_model.steps.tables["default"]} == {way.name.split()[-1]}


def test_a_run_learns_and_a_rerun_only_adds_what_is_missing(tmp_path, monkeypatch):
    """A stop loses the run that was going on and no other."""
    write_questions(tmp_path, QUESTIONS)
    task, rows, loads = Recall(8, 30, batch_size=4), Rows(tmp_path / "rows.json"), []
    pairs = load_pairs(tmp_path, task, Letters())

    def load(device, fail_at=None):
        loads.append(device)
        if len(loads) == fail_at:
            raise KeyboardInterrupt
        return tiny(), Letters()

    monkeypatch.setattr(runs, "RATE", 3e-2)
    monkeypatch.setattr(runs, "R", 64)
    monkeypatch.setattr(runs, "load_base", lambda device: load(device, fail_at=2))
    with pytest.raises(KeyboardInterrupt):
        runs.run_all(rows, states.WAYS[:2], [0], task, pairs, "cpu")
    assert [row["method"] for row in rows.read()["rows"]] == [states.WAYS[0].name]
    monkeypatch.setattr(runs, "load_base", load)
    for _ in range(2):
        runs.run_all(rows, states.WAYS[:2], [0], task, pairs, "cpu")
    assert len(loads) == 3
    trained = rows.read()["rows"][-1]
    assert trained["losses"][0] > 2 * trained["train_loss"]
    assert trained["train_loss"] == pytest.approx(sum(trained["losses"][-2:]) / 2, abs=1e-4)
    assert trained["exact_match"] == trained["exact"].count("1") / 8


def test_the_kept_page_is_of_the_kept_rows_and_a_rerun_finds_them():
    rows = Rows(RESULTS / "meft_states.json")
    content = rows.read()
    assert states.text(content["rows"], states.TASK, quick=False) == rows.path.with_suffix(".md").read_text()
    assert len(content["rows"]) == len(states.WAYS) * len(states.SEEDS)
    for way in states.WAYS:
        settings = way.settings | states.TASK.settings() | {"device": "cpu"}
        for seed in states.SEEDS:
            assert rows.find({"method": way.name, "seed": seed, "learning_rate": runs.RATE}, settings)
    assert json.loads(rows.path.read_text())["data"]
