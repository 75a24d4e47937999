"""Rows of training data from a local file or from the hub."""

import csv
import json
from pathlib import Path
from typing import Any

from aslora_meft.errors import UsageError, as_usage_error

Row = dict[str, Any]
_SUFFIXES = (".jsonl", ".json", ".csv", ".txt")


def read_rows(source: str, *, field: str, config: str | None, split: str) -> list[Row]:
    """Read all rows of ``source``: a .jsonl, .json, .csv or .txt file, or else a hub id (needs ``datasets``).

    A .txt file is one row with the column ``text``. ``field`` is the argument that errors name; ``config`` and
    ``split`` matter for the hub alone.

    Raises:
        UsageError: no such file or data set, an unreadable or empty file, or a row that is no mapping.
    """
    path = Path(source).expanduser()
    if path.suffix in _SUFFIXES or path.exists():
        rows = _read_file(path, field)
    else:
        rows = _read_hub(source, field, config, split)
    if not rows:
        raise UsageError(f"{field}={source!r} has no rows; give data with at least one")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UsageError(f"{field}={source!r} row {number} is not an object with named columns; correct it")
    return rows


def _read_file(path: Path, field: str) -> list[Row]:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UsageError(f"{field}={str(path)!r} {what}; give a file ending on {', '.join(_SUFFIXES)} or a hub id")
    if path.suffix not in _SUFFIXES:
        raise UsageError(f"{field}={str(path)!r} is of unknown kind; its name must end on {', '.join(_SUFFIXES)}")
    with (
        as_usage_error(UnicodeDecodeError, prefix=f"{field}={str(path)!r} is not UTF-8, save it as such: "),
        # newline="" keeps line breaks inside quoted csv fields; utf-8-sig drops the mark that spreadsheets write.
        path.open(encoding="utf-8-sig", newline="") as file,
    ):
        if path.suffix == ".csv":
            return _read_csv(file, f"{field}={str(path)!r}")
        if path.suffix == ".jsonl":
            return [_parse(line, f"{field}={str(path)!r} row {number}") for number, line in enumerate(file, 1)]
        text = file.read()
    if path.suffix == ".txt":
        return [{"text": text}]
    rows = _parse(text, f"{field}={str(path)!r}")
    if not isinstance(rows, list):
        raise UsageError(f"{field}={str(path)!r} is not a JSON list of rows; save it as one, or as .jsonl")
    return rows


def _parse(text: str, where: str) -> Any:
    if not text.strip():
        raise UsageError(f"{where} is empty; fill it or delete it")
    with as_usage_error(json.JSONDecodeError, prefix=f"{where} is not valid JSON: "):
        return json.loads(text)


def _read_csv(file: Any, where: str) -> list[Row]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than a long document
    reader = csv.DictReader(file, restkey="", strict=True)
    rows: list[Row] = []
    try:
        for row in reader:
            if "" in row:
                raise UsageError(f"{where} row {len(rows) + 1} has more fields than the header; quote its commas")
            rows.append(row)
    except csv.Error as error:
        raise UsageError(f"{where} row {len(rows) + 1} is not valid csv: {error}") from error
    return rows


def _read_hub(name: str, field: str, config: str | None, split: str) -> list[Row]:
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"{field}={name!r} is no local file, and to read it from the hub the package datasets is missing; "
            "pip install 'aslora-meft[train]'"
        ) from error
    with as_usage_error(ValueError, OSError, prefix=f"{field}={name!r} could not be loaded, check name and split: "):
        return list(datasets.load_dataset(name, config, split=split))
