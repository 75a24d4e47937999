import json
import sys

import pytest

from aslora_meft.data.files import read_rows
from aslora_meft.errors import UsageError


def read(source):
    return read_rows(str(source), field="data", config=None, split="train")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"prompt": "p\\u2028q", "completion": "c"}\n{"prompt": "a,b", "completion": "d\\ne"}\n'),
        ("a.json", '[{"prompt": "p\\u2028q", "completion": "c"}, {"prompt": "a,b", "completion": "d\\ne"}]'),
        ("a.csv", '\ufeffprompt,completion\np\u2028q,c\n"a,b","d\ne"\n'),
    ],
)
def test_every_kind_gives_the_same_rows(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read(tmp_path / name) == [
        {"prompt": "p\u2028q", "completion": "c"},
        {"prompt": "a,b", "completion": "d\ne"},
    ]


def test_text_is_one_row(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert read(tmp_path / "a.txt") == [{"text": "one\n\ntwo\n"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl' row 2 is not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n[2]\n', r"row 2 is not an object"),
        ("a.jsonl", b"", r"has no rows"),
        ("a.json", b'{"a": 1}', r"is not a JSON list"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", r"row 2 has more fields than the header"),
        ("a.csv", b'a,b\n1,2\n"1,2\n', r"row 2 is not valid csv"),
        ("a.csv", b"a,b\n", r"has no rows"),
        ("a.txt", b"\xff\xfe", r"is not UTF-8"),
        ("a.xlsx", b"", r"is of unknown kind"),
        ("a.jsonl.gz", b"{}", r"is no whole gzip file"),
        ("a.json", b"", r"a\.json' is empty"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read(tmp_path / name)


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"none\.jsonl' does not exist"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match=r"is a folder"):
        read(tmp_path)


def test_without_datasets_a_hub_id_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install 'aslora-meft\[train\]'"):
        read("someone/something")


def test_a_hub_id_is_read_by_datasets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = [{"text": "a"}, {"text": "b"}]
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or datasets.Dataset.from_list(rows)
    )
    assert read_rows("o/n", field="data", config="main", split="train") == rows
    assert asked == [(("o/n", "main"), {"split": "train"})]


def test_a_long_csv_field_is_read(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(read(tmp_path / "a.csv")[0]["text"]) == 200_000


def test_nested_json_is_kept(tmp_path):
    row = {"messages": [{"role": "user", "content": "hi"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert read(tmp_path / "a.jsonl") == [row]
