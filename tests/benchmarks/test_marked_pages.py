"""The cells that a device fills stand in README.md and docs/*.md, with keys that `device_check.py` gives."""

import json
from pathlib import Path

import pytest

from benchmarks import ingest_device as ingest

ROOT = Path(ingest.ROOT)
UNMEASURED = {"nothing", "not measured", "not measured by us"}


@pytest.fixture
def returned(tmp_path):
    """results.json of a made-up device."""
    link = {
        "part": "probe",
        "what": "link up",
        "measured": "50 GB/s",
        "holds": None,
        "target": "",
        "values": {"gb_s": 50},
    }
    results = {
        "version": 1, "rehearsal": False, "began": "2030-01-02T03:04:05+00:00", "machine": {"gpu": "NVIDIA X9"},
        "source": {"commit": "", "digest": "d"}, "parts": [], "findings": [link], "files": {},
    }  # fmt: skip
    path = tmp_path / "in" / "results.json"
    path.parent.mkdir()
    path.write_text(json.dumps(results))
    return path


def test_pages_with_marks_are_found(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("<!-- device:probe machine -->nothing<!-- /device -->")
    (tmp_path / "docs" / "b.md").write_text("a\n<!-- device:probe link up: gb_s -->\nold\n<!-- /device -->")
    (tmp_path / "docs" / "a.md").write_text("no mark")
    assert ingest.marked_pages(tmp_path) == [tmp_path / "README.md", tmp_path / "docs" / "b.md"]


def test_all_pages_are_filled_where_results_go_to_the_results(returned, tmp_path, monkeypatch):
    text = "<!-- device:probe link up: gb_s -->old<!-- /device -->\n"
    (tmp_path / "docs").mkdir()
    pages = [tmp_path / "README.md", tmp_path / "docs" / "hardware.md"]
    for page in pages:
        page.write_text(text)
    monkeypatch.setattr(ingest, "ROOT", tmp_path)
    monkeypatch.setattr(ingest, "RESULTS", tmp_path / "results")
    assert ingest.main([str(returned), "--out", str(tmp_path / "elsewhere")]) == 0
    assert [page.read_text() for page in pages] == [text, text]
    assert ingest.main([str(returned), "--out", str(tmp_path / "results")]) == 0
    filled = text.replace("old", "50.0 GB/s (measured on NVIDIA X9, 2030-01-02)")
    assert [page.read_text() for page in pages] == [filled, filled]


def test_cells_of_this_repository():
    pages = ingest.marked_pages(ROOT)
    assert {page.name for page in pages} >= {"README.md", "hardware.md"}
    for page in pages:
        text = page.read_text()
        cells = ingest.MARKED.findall(text)
        assert len(cells) == text.count("<!-- device:") == text.count("<!-- /device -->")  # none is half a mark
        for _, key, held, _ in cells:
            assert key.split()[0] in ("24gb", "kernels", "probe")
            assert held in UNMEASURED or "measured on" in held
