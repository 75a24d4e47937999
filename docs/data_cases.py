"""The formats of training data, one case a row: what the table of `data.md` shows and the tests train on."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

PAIRS = [{"prompt": "one", "completion": "two"}, {"prompt": "three", "completion": "four"}]
ASKED, ANSWERED = {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}
TURNS = [ASKED, ANSWERED, {"role": "user", "content": "three"}, {"role": "assistant", "content": "four"}]


class Case(NamedTuple):
    """One format.

    Attributes:
        name: the first column of the table.
        files: file name -> what writes it.
        learnt: the texts that are learnt, one a sample.
        needs: the extra that it needs, if any.
        options: fields of `DataArguments` beside `data`.
    """

    name: str
    files: dict[str, Callable[[Path], Any]]
    learnt: list[str]
    needs: str = ""
    options: Mapping[str, Any] = MappingProxyType({})


def text(content: str, encoding: str = "utf-8") -> Callable[[Path], Any]:
    return lambda path: path.write_text(content, encoding=encoding, newline="")


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def zipped(content: str) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(gzip.compress(content.encode()))


def parquet(rows: list[dict[str, Any]]) -> Callable[[Path], Any]:
    def write(path: Path) -> None:
        import pyarrow
        from pyarrow import parquet

        index = [{**row, "__index_level_0__": number} for number, row in enumerate(rows)]  # as pandas writes it
        parquet.write_table(pyarrow.Table.from_pylist(index), path)

    return write


TWO = ["two", "four"]
INDEXED = ",prompt,completion\n0,one,two\n1,three,four\n"
CSV = "prompt,completion\none,two\nthree,four\n"
SHAREGPT = [{"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]}]
ALPACA = [{"instruction": "one", "input": "context", "output": "two"}]

CASES = [
    Case("JSON lines", {"a.jsonl": text(lines(PAIRS))}, TWO),
    Case("JSON lines, suffix in capitals, blank lines", {"a.JSONL": text(lines(PAIRS).replace("\n", "\n\n"))}, TWO),
    Case("JSON list", {"a.json": text(json.dumps(PAIRS, indent=1))}, TWO),
    Case("JSON lines in a file called .json", {"a.json": text(lines(PAIRS))}, TWO),
    Case("csv", {"a.csv": text(CSV)}, TWO),
    Case("csv with the index that pandas writes", {"a.csv": text(INDEXED)}, TWO),
    Case("csv with blank lines, BOM and CRLF", {"a.csv": text("\ufeff" + CSV.replace("\n", "\r\n\r\n"))}, TWO),
    Case("csv with blank lines first, and a spreadsheet's", {"a.csv": text("\n\n" + CSV + ",\n")}, TWO),
    Case("csv with semicolons", {"a.csv": text(CSV.replace(",", ";"))}, TWO),
    Case("csv with tabs or bars",
         {"a.csv": text(CSV.replace(",", "\t")), "b.csv": text(CSV.replace(",", "|"))}, TWO * 2),
    Case("tsv", {"a.tsv": text(CSV.replace(",", "\t"))}, TWO),
    Case("parquet", {"a.parquet": parquet(PAIRS)}, TWO, needs="train"),
    Case("gzip of a text format", {"a.json.gz": zipped(json.dumps(PAIRS))}, TWO),
    Case("several files", {"a.jsonl": text(lines(PAIRS[:1])), "b.csv": text("prompt,completion\nthree,four\n")}, TWO),
    Case("plain text", {"a.txt": text("one two")}, ["one two"]),
    Case("columns of other names", {"a.csv": text("q,a\none,two\n")}, ["two"],
         options={"prompt_column": "q", "completion_column": "a"}),
    Case("conversation", {"a.jsonl": text(lines([{"messages": TURNS}]))}, ["twofour"]),
    Case("prompt and completion as a conversation",
         {"a.jsonl": text(lines([{"prompt": TURNS[:3], "completion": TURNS[3:]}]))}, ["four"]),
    Case("prompt and completion in the chat template", {"a.jsonl": text(lines(PAIRS))}, TWO,
         options={"apply_chat_template": True}),
    Case("ShareGPT", {"a.jsonl": text(lines(SHAREGPT))}, ["two"], needs="trl"),
    Case("alpaca", {"a.json": text(json.dumps(ALPACA))}, ["two"]),
]  # fmt: skip

HEAD = "| format | files | columns that are used | needs |\n|---|---|---|---|"


def write(case: Case, folder: Path) -> list[str]:
    """Write a case's files; returns their paths."""
    for name, writer in case.files.items():
        writer(folder / name)
    return [str(folder / name) for name in case.files]


def table() -> str:
    """The table of `data.md`, with the columns as the command line recognises them."""
    import tempfile

    from aslora_meft.arguments.groups import DataArguments
    from aslora_meft.data.files import read_rows
    from aslora_meft.data.formats import recognise

    rows = [HEAD]
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            paths = write(case, Path(folder))
            args = DataArguments(data=paths, **case.options)
            formats = [recognise(read_rows(p, field="data", config=None, split="train"), args, p) for p in paths]
        used = ", ".join(dict.fromkeys(f"`{column}`" for fmt in formats for column in fmt.used))
        extra = f"`pip install 'aslora-meft[{case.needs}]'`" if case.needs else ""
        names = ", ".join(f"`{name}`" for name in case.files)
        rows.append(f"| {case.name} | {names} | {used} | {extra} |")
    return "\n".join(rows)


BEGIN, END = "<!-- formats: made by python docs/data_cases.py -->", "<!-- end of formats -->"


def main() -> None:
    """Put the table into `data.md`."""
    page = Path(__file__).with_name("data.md")
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
