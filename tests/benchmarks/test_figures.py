"""The figures of the documentation show what the committed rows say."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks.aslora_classify.runs import read_settings as classify_settings
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


def test_a_gain_is_paired_by_seed_and_of_methods_with_all_seeds(tmp_path):
    settings = classify_settings(numbers.ASLORA_SETTINGS)
    seeds, rows = settings.protocol.seeds, []

    def add(name, loss, accuracy, values, left_out=()):
        task, method = next(
            job for job in settings.jobs if (job[0].name, job[1].name) == (settings.tasks[1].name, name)
        )
        of_row = settings_of_row(settings, task, method, "cpu")
        shared = {"task": task.name, "method": name, "split": "test", "learning_rate": 0.1, "values_end": values}
        for number, seed in enumerate(seeds):
            measured = {"loss": loss + number / 8, "accuracy": accuracy}
            rows.extend([shared | {"seed": seed, "settings": of_row} | measured] if seed not in left_out else [])

    add("LoRA r 8", 0.5, 0.5, 40)
    write(tmp_path, "aslora_classify_option.json", rows)
    assert numbers.aslora(tmp_path) is None
    add("ASLoRA r 8", 0.25, 0.625, 10)
    add("LoRA r 2", 0.25, 0.5, 10, left_out=seeds[:1])
    write(tmp_path, "aslora_classify_option.json", rows)
    found = numbers.aslora(tmp_path)
    assert [len(task["points"]) for task in found["tasks"]] == [0, 1, 0]
    (point,) = found["tasks"][1]["points"]
    assert (point["label"], point["values"]) == ("ASLoRA r 8", 25)
    mean_loss = 0.5 + 3.5 / 8  # the gain is the same for all seeds
    assert point["loss"] == {
        "n": 8,
        "mean": numbers.rounded(25 / mean_loss),
        "interval": [numbers.rounded(25 / mean_loss)] * 2,
    }
    assert point["accuracy"] == {"n": 8, "mean": 12.5, "interval": [12.5, 12.5]}
    assert found["margins"] == {"loss": 2.0, "accuracy": 1.0}


def test_the_figure_of_aslora_has_a_place_for_each_method_and_says_what_is_missing():
    pytest.importorskip("matplotlib")
    from benchmarks.figures import draw
    from benchmarks.figures.style import THEMES

    gain = {"n": 8, "mean": 1.0, "interval": [-1.0, 3.0]}
    points = [{"label": label, "values": 25, "loss": gain, "accuracy": gain} for label in ("a", "b")]
    tasks = [{"task": "one", "points": points}, {"task": "two", "points": []}]
    shown = {"seeds": 8, "rival": "LoRA r 8", "margins": {"loss": 2.0, "accuracy": 1.0}, "tasks": tasks}
    figure = draw.aslora(shown, THEMES["light"])
    for axes in figure.axes:
        assert [text.get_text().strip() for text in axes.texts] == ["not measured"]
        marks = [line for line in axes.lines if line.get_marker() != "None"]
        assert [list(mark.get_xdata()) for mark in marks] == [[1.0], [1.0]]
        assert len({mark.get_ydata()[0] for mark in marks}) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"{x}, 25 % of the values" for x in "ab"]


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
