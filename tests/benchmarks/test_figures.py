"""The figures of the documentation show what the committed rows say."""

import json
import statistics
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks.common.runs import settings_of_row
from benchmarks.figures import numbers
from benchmarks.meft_forgetting.runs import read_settings

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "figures"
DESCRIPTION = "{http://purl.org/dc/elements/1.1/}description"


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", ["aslora", "meft"])
def test_committed_figures_hold_the_numbers_of_the_rows(name, theme):
    path, expected = FOLDER / f"{name}-{theme}.svg", getattr(numbers, name)()
    if expected is None:
        assert not path.exists()
        return
    assert path.exists(), "run python -m benchmarks.figures"
    held = ElementTree.fromstring(path.read_text(encoding="utf-8")).find(f".//{DESCRIPTION}")
    assert json.loads(held.text) == expected, "run python -m benchmarks.figures"


def test_committed_figures_are_what_is_drawn():
    pytest.importorskip("matplotlib")
    from benchmarks.figures import __main__ as figures

    for path, drawn in figures.files().items():
        assert path.read_bytes() == drawn, "run python -m benchmarks.figures"


def write(folder, name, rows):
    (folder / name).write_text(json.dumps({"environments": [], "rows": rows}))


def test_a_point_is_the_mean_and_t_interval_of_the_reported_seeds(tmp_path):
    assert numbers.aslora(tmp_path) is None

    def row(match, split="test", **fields):
        shared = {"task": "banking77", "method": "ASLoRA r 8", "split": split, "exact_match": match}
        return shared | {"parameters_end": 12} | fields

    matches = [0.5, 0.6, 0.9]
    others = [row(0.1, "valid"), row(0.1, method="ASLoRA r 8, share_a=joint")]
    write(tmp_path, "aslora_quality.json", [*map(row, matches), *others])
    banking, gsm8k = numbers.aslora(tmp_path)["panels"]
    (point,) = banking["points"]
    half = 4.3027 * 100 * statistics.stdev(matches) / 3**0.5  # t(2)
    middle = 100 * statistics.mean(matches)
    assert (point["label"], point["values"], point["n"]) == ("ASLoRA r 8", 12, 3)
    assert point["mean"] == pytest.approx(middle, rel=1e-3)
    assert point["interval"] == pytest.approx([middle - half, middle + half], rel=1e-3)
    assert gsm8k["points"] == []


def test_the_frontier_and_the_reported_seeds_so_far(tmp_path):
    assert numbers.meft(tmp_path) is None

    settings = read_settings(numbers.MEFT_SETTINGS)
    task, method = next(job for job in settings.jobs if job[1].name == "LoRA r 64")
    of_row = settings_of_row(settings, task, method, "cpu")

    def row(split, rate, seed, recall, forgetting, **fields):
        shared = {"task": "64 facts", "method": "LoRA r 64", "split": split, "learning_rate": rate, "seed": seed}
        shared |= {"settings": of_row}
        return shared | {"recall": recall, "forgetting": forgetting} | fields

    rows = [
        row("valid", 2e-3, 100, 1.0, 0.5), row("valid", 1e-3, 100, 0.5, 0.25), row("valid", 4e-3, 100, 0.0, None),
        row("test", 2e-3, 1000, 0.75, 0.5), row("diverged", 2e-3, 1001, 0.0, 9.0), row("test", 2e-3, 1, 0.0, 9.0),
        row("valid", 2e-3, 100, 0.0, 9.0, task="16 facts"),
    ]  # fmt: skip
    write(tmp_path, "meft_forgetting.json", rows)
    found = numbers.meft(tmp_path)
    assert (found["planned"], found["facts"]) == (8, 64)
    (lora,) = found["methods"]
    assert lora["frontier"] == [[50.0, 0.25], [100.0, 0.5]]
    assert lora["recall"] == {"n": 1, "mean": 75.0, "interval": None}
    assert lora["forgetting"] == {"n": 1, "mean": 0.5, "interval": None}


def test_the_figure_of_meft_names_what_is_missing():
    pytest.importorskip("matplotlib")
    from benchmarks.figures import draw
    from benchmarks.figures.style import THEMES

    reported = {"n": 2, "mean": 0.25, "interval": [0.125, 0.375]}
    methods = [
        {"label": "whole", "frontier": [[50.0, 0.1], [95.0, 0.2]], "forgetting": reported | {"n": 8},
         "recall": {"n": 8, "mean": 96.0, "interval": [95.0, 97.0]}},
        {"label": "begun", "frontier": [[91.0, 0.3], [99.0, 7.0]], "forgetting": reported,
         "recall": {"n": 2, "mean": 92.0, "interval": [90.0, 94.0]}},
        {"label": "tuned", "frontier": [[10.0, 0.9]]},
        {"label": "reported", "frontier": [], "forgetting": reported | {"n": 1, "interval": None},
         "recall": {"n": 1, "mean": 90.0, "interval": None}},
    ]  # fmt: skip
    numbers = {"planned": 8, "facts": 64, "least_recall": 0.9, "methods": methods}
    left, right = draw.meft(numbers, THEMES["dark"]).axes
    assert [label.get_text() for label in right.get_yticklabels()] == [
        "whole\nrecalls 96 %", "begun\nrecalls 92 % (2 of 8 seeds)", "tuned\nnot measured",
        "reported\nrecalls 90 % (1 of 8 seeds)",
    ]  # fmt: skip
    assert [list(line.get_xdata()) for line in left.lines[:4]] == [[50.0, 95.0], [91.0, 99.0], [10.0], []]
    assert left.get_ylim()[1] == pytest.approx(1.1 * 2 * 0.3)
    none_recalls = numbers | {"methods": [methods[2]]}
    assert draw.meft(none_recalls, THEMES["light"]).axes[0].get_ylim()[1] > 0.9
