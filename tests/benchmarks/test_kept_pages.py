"""The pages in `results/` are those of the rows beside them."""

import importlib
import shutil
import sys

import pytest

from benchmarks.common.places import RESULTS, ROOT

PROGRAMS = ("aslora_classify", "meft_facts", "meft_forgetting", "meft_sequence")
SETTINGS = [path for name in PROGRAMS for path in sorted((ROOT / "benchmarks" / name).glob("*.json"))]


def kept(settings):
    """Where the rows of a settings file are kept, without the ending."""
    name, own = settings.parent.name, settings.stem
    return RESULTS / (name if own == "settings" else f"{name}_{own}")


MEASURED = [path for path in SETTINGS if path.stem != "quick" and kept(path).with_suffix(".json").exists()]


@pytest.mark.parametrize("settings", MEASURED, ids=lambda path: kept(path).name)
def test_a_report_writes_the_kept_page(settings, tmp_path, monkeypatch):
    own = kept(settings)
    shutil.copy(own.with_suffix(".json"), tmp_path)
    options = ["--report", "--settings", str(settings), "--out", str(tmp_path / f"{own.name}.json")]
    monkeypatch.setattr(sys, "argv", [settings.parent.name, *options])
    assert importlib.import_module(f"benchmarks.{settings.parent.name}.__main__").main() == 0
    assert (tmp_path / f"{own.name}.md").read_text() == own.with_suffix(".md").read_text()


def test_there_are_rows_of_each_program():
    assert {path.parent.name for path in MEASURED} == set(PROGRAMS)
