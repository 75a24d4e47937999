"""Reading what a user wrote: JSON, text and paths, with one sentence for what cannot be read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from aslora_meft.errors import UsageError


def parse_json(text: str, where: str) -> Any:
    """Parse JSON.

    Args:
        where: what the sentence begins with, e.g. "data='rows.jsonl' row 3".

    Raises:
        UsageError: it is not JSON, is nested too deeply, or holds a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise UsageError(f"{where} is nested too deeply; flatten it") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"{where} is not valid JSON: {error}; correct it") from error
    except ValueError:  # Python's limit of digits
        raise UsageError(f"{where} has a number with too many digits; write it as a string") from None


def is_encodable(text: str) -> bool:
    """Whether a string can be encoded as UTF-8: JSON can hold half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def local_path(field: str, value: str) -> Path:
    """A path that a user gave, with `~` expanded; whether it exists is not checked.

    Raises:
        UsageError: no path can have this name.
    """
    if "\0" in value:
        raise UsageError(f"{field}={value!r} holds a NUL character; give the path without it")
    if not is_encodable(value):  # a name in another encoding, which safetensors and JSON do not take
        raise UsageError(f"{field}={value!r} is no name in UTF-8; rename it")
    if not value.strip():
        raise UsageError(f"{field}={value!r} is empty; give a path")
    try:
        path = Path(value).expanduser()
    except RuntimeError as error:  # ~somebody who is unknown here
        raise UsageError(f"{field}={value!r} names an unknown home folder ({error}); write the whole path") from error
    if any(len(os.fsencode(part)) > 255 for part in path.parts) or len(os.fsencode(path)) > 4000:
        raise UsageError(f"{field}={value[:60]!r}... is too long for a path; give a shorter one")
    return path


def check_ordinary(field: str, folder: Path) -> None:
    """Check that a folder holds files and folders alone: reading a pipe or a device might never end.

    Raises:
        UsageError: it holds something else.
        OSError: it cannot be read.
    """
    for path in folder.iterdir():
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UsageError(f"{field}={str(folder)!r} holds {path.name!r}, which is no ordinary file; remove it")


def is_path(value: str) -> bool:
    """Whether a value for "folder or hub id" can only be meant as a path."""
    return value.startswith((".", "/", "~")) or value.count("/") > 1
