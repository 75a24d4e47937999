"""The benchmark of narrower masters and moments runs, and its bytes are those that the page promises."""

import json

import pytest

from benchmarks.meft_layer import row_states
from meft.table.row_step import native_library

pytestmark = pytest.mark.skipif(native_library() is None, reason="the C++ library was not built at installation")


def test_bytes_and_rates_of_each_way(tmp_path, capsys):
    out = tmp_path / "row_states.json"
    assert row_states.main(["--rounds", "2", "--out", str(out)], size=(32, 8, 1024)) == 0
    result = json.loads(out.read_text())
    names = {row_states.named(*way) for way in row_states.WAYS}
    assert all(found.keys() == names for found in result["threads"].values())
    moved = result["bytes moved by an update of a value"]
    if moved is not None:
        assert moved["float32 masters, moments float32"] == 28
        assert moved["bfloat16 masters, moments rowwise"] == 10 + 8 / 1024
        assert moved["bfloat16 masters, moments float8"] == 10 + 16 / 256
    assert result["bytes kept for a value"]["bfloat16 masters, moments float8"] == 4 + 8 / 256
    assert "bfloat16 masters, moments rowwise" in capsys.readouterr().out
