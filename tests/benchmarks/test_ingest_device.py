"""What `ingest_device.py` makes of results.json: files, and the marked places of a README."""

import json

import pytest

from benchmarks import ingest_device as ingest
from benchmarks.device import findings
from tests.support.made_results import finding, results_of


@pytest.fixture
def returned(tmp_path):
    """results.json of a made-up device."""
    row = {
        "contestant": "meft auto",
        "routing": "0.26",
        "status": "measured",
        "peak_gib": 15.04,
        "tokens_per_s": 1234.5,
    }
    files = {"24gb_x9_quick.json": json.dumps({"rows": [row]}), "kernels_x9.csv": "op\n"}
    found = [
        finding("link up", "50.0 GB/s", gb_s=50.0), finding("link down", findings.UNMEASURED),
        finding("sparse_ffn", "3/4", False, "ops", "its float64 oracle"),
    ]  # fmt: skip
    path = tmp_path / "in" / "results.json"
    path.parent.mkdir()
    path.write_text(json.dumps(results_of(*found, files=files)))
    (path.parent / "24gb_x9_quick.png").write_bytes(b"plot")
    return path


def test_files_of_a_device(returned, tmp_path):
    out = tmp_path / "out"
    assert ingest.main([str(returned), "--out", str(out)]) == 0
    names = ["", "_24gb.json", "_24gb.png", "_kernels.csv"]
    assert {path.name for path in out.iterdir()} >= {f"device_nvidia_x9{name}" for name in names if name}
    text = (out / "device_nvidia_x9.md").read_text()
    assert "FAILS        ops        sparse_ffn: 3/4" in text  # bad results are kept too
    assert "other code than this" in text
    assert "files" not in json.loads((out / "device_nvidia_x9.json").read_text())


def test_only_marked_places_are_replaced(returned, tmp_path):
    readme = tmp_path / "README.md"
    marks = (
        "a <!-- device:probe link up: gb_s -->old<!-- /device --> b <!-- device:probe link down -->old<!-- /device -->"
    )
    readme.write_text(f"{marks} <!-- device:24gb meft auto 0.26 peak -->\nold\n<!-- /device --> old\n")
    ingest.main([str(returned), "--out", str(tmp_path / "out"), "--readme", str(readme)])
    where = "measured on NVIDIA X9, 2030-01-02"
    assert readme.read_text() == (
        f"a <!-- device:probe link up: gb_s -->50.0 GB/s ({where})<!-- /device --> "
        "b <!-- device:probe link down -->old<!-- /device --> "  # not measured: as it was
        f"<!-- device:24gb meft auto 0.26 peak -->15.0 GiB ({where})<!-- /device --> old\n"
    )


@pytest.mark.parametrize(("status", "said"), [("OOM", "does not fit"), ("OOM on the host", "does not fit the host")])
def test_what_does_not_fit_says_so(status, said):
    row = {"contestant": "null", "routing": "0.26", "status": status, "peak_gib": None}
    found = ingest.cells(results_of(files={"24gb_x9.json": json.dumps({"rows": [row]})}))
    assert found["24gb null 0.26 peak"] == found["24gb null 0.26 tokens/s"] == said
    row["status"] = "error: X"
    assert ingest.cells(results_of(files={"24gb_x9.json": json.dumps({"rows": [row]})})) == {}


def test_a_miss_says_so(returned):
    found = ingest.cells(json.loads(returned.read_text()))
    assert found["ops sparse_ffn"] == "3/4, which misses the target"
    assert found["24gb meft auto 0.26 tokens/s"] == "1,234 tokens/s"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 9}'])
def test_files_that_are_no_results(text, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match=r"no results\.json|of version 9"):
        ingest.main([str(path)])
