"""Rows of training data from local files or from the hub."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from pathlib import Path
from typing import Any, TextIO

from aslora_meft.arguments.text import is_path, local_path, parse_json
from aslora_meft.errors import UsageError, as_usage_error

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")
_LISTED = f"{', '.join(SUFFIXES)} (text also with .gz)"


def read_rows(source: str, *, field: str, config: str | None, split: str) -> list[Row]:
    """Read all rows of ``source``: a file with one of :data:`SUFFIXES`, or else a hub id (needs ``datasets``).

    A .txt file is one row with the column ``text``. ``field`` is the argument that errors name; ``config`` and
    ``split`` matter for the hub alone.

    Raises:
        UsageError: no such file or data set, an unreadable or empty file, or a row that is no mapping.
    """
    path = local_path(field, source)
    with as_usage_error(OSError, prefix=f"{field}={source!r} cannot be read: "):
        if _suffixes(path)[0] in SUFFIXES or is_path(source) or path.exists():
            rows = _read_file(path, field)
        else:
            rows = _read_hub(source, field, config, split)
    if not rows:
        raise UsageError(f"{field}={source!r} has no rows; give data with at least one")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UsageError(f"{field}={source!r} row {number} is not an object with named columns; correct it")
        if not row:
            raise UsageError(f"{field}={source!r} row {number} has no columns; fill it or delete it")
    return rows


def _suffixes(path: Path) -> tuple[str, bool]:
    """The suffix that says what a file holds, in lower case, and whether the file is compressed."""
    name = path.name.lower()
    compressed = name.endswith(".gz")
    return Path(name.removesuffix(".gz")).suffix, compressed


def _read_file(path: Path, field: str) -> list[Row]:
    where = f"{field}={str(path)!r}"
    if not path.exists():
        raise UsageError(f"{where} does not exist; give a file ending on {_LISTED} or a hub id")
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no ordinary file"
        raise UsageError(f"{where} is {what}; give the files in it, ending on {_LISTED}")
    suffix, compressed = _suffixes(path)
    if suffix not in SUFFIXES or (compressed and suffix == ".parquet"):
        raise UsageError(f"{where} is of unknown kind; its name must end on {_LISTED}")
    if suffix == ".parquet":
        return _read_parquet(path, where)
    open_text: Any = gzip.open if compressed else open
    with (
        as_usage_error(UnicodeDecodeError, prefix=f"{where} is not UTF-8, save it as such: "),
        as_usage_error(gzip.BadGzipFile, EOFError, zlib.error, prefix=f"{where} is no whole gzip file: "),
        # newline="" keeps line breaks inside quoted csv fields; utf-8-sig drops the mark that spreadsheets write.
        open_text(path, "rt", encoding="utf-8-sig", newline="") as file,
    ):
        if suffix in (".csv", ".tsv"):
            return _read_csv(file, suffix, where)
        if suffix == ".jsonl":
            return _read_json_lines(file, where)
        text = file.read()
    if suffix == ".txt":
        return [{"text": text}] if text.strip() else []
    if not text.strip():
        raise UsageError(f"{where} is empty; fill it or delete it")
    first = io.StringIO(text.lstrip(), newline="").readline().rstrip()
    if first[0] == "{" and first[-1] == "}" and len(first) < len(text.strip()):
        return _read_json_lines(io.StringIO(text, newline=""), where)  # so pandas and datasets name them
    rows = parse_json(text, where)
    if not isinstance(rows, list):
        raise UsageError(f"{where} is not a JSON list of rows; save it as one, or as .jsonl")
    return rows


def _read_json_lines(file: TextIO, where: str) -> list[Row]:
    return [parse_json(line, f"{where} row {number}") for number, line in enumerate(file, 1) if line.strip()]


def _read_csv(file: TextIO, suffix: str, where: str) -> list[Row]:
    """Rows of a csv or tsv file.

    A column without a name, such as the index that pandas writes, is left out, and so are rows without any value, which
    are the blank lines of a spreadsheet.
    """
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than a long document
    start, head = 0, file.readline()
    while head and not head.strip():  # else a blank line would be the header
        start, head = file.tell(), file.readline()
    file.seek(start)
    if "\0" in head:
        raise UsageError(f"{where} holds NUL characters; save it as UTF-8 text")
    # Spreadsheets write semicolons where the comma is the decimal sign; other tools write tabs or bars.
    delimiter = "\t" if suffix == ".tsv" else next((mark for mark in ";\t|" if mark in head and "," not in head), ",")
    reader = csv.DictReader(file, delimiter=delimiter, strict=True)
    rows: list[Row] = []
    try:
        names = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = names
        if twice := {name for name in names if name and names.count(name) > 1}:
            raise UsageError(f"{where} has two columns named {min(twice)!r}; rename one")
        for row in reader:
            if None in row:  # where DictReader puts what has no column
                raise UsageError(f"{where} row {len(rows) + 1} has more fields than the header; quote its commas")
            if any(row.values()):
                rows.append({name: value for name, value in row.items() if name})
    except csv.Error as error:
        raise UsageError(f"{where} row {len(rows) + 1} is not valid csv: {error}; correct it") from error
    return rows


def _read_parquet(path: Path, where: str) -> list[Row]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(f"{where} needs the package pyarrow; pip install 'aslora-meft[train]'") from error
    # Beside pyarrow's own errors, those of Python for dates and spans that it does not know.
    with as_usage_error(Exception, prefix=f"{where} is no parquet file that can be read: "):
        rows: list[Row] = parquet.read_table(path).to_pylist()
    for row in rows:
        row.pop("__index_level_0__", None)  # the index that pandas writes
    return rows


def _read_hub(name: str, field: str, config: str | None, split: str) -> list[Row]:
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"{field}={name!r} is no local file, and to read it from the hub the package datasets is missing; "
            "pip install 'aslora-meft[train]'"
        ) from error
    with as_usage_error(Exception, prefix=f"{field}={name!r} is no local file and could not be loaded from the hub: "):
        return list(datasets.load_dataset(name, config, split=split))
