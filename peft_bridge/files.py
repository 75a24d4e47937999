"""Files and folders that are replaced whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sync(path: Path) -> None:
    """Force a file or folder to the disk, so that a rename cannot overtake the data."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: str | os.PathLike, data: bytes) -> None:
    """Write `data` to `path` so that a reader, or a process killed at any point, sees the old or the new file whole."""
    path = Path(path)
    name = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # mkstemp's 0o600 would hide it from a team
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    sync(path.parent)


@contextmanager
def folder_replaced_at_once(path: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder beside `path` that takes its place when the block ends without an exception.

    Raises:
        ValueError: `path` exists and is not an empty folder (nothing of it is touched).
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"output folder '{path}' exists and is not empty: choose another one or remove it first.")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield draft
        draft.chmod(0o755)
        for file in draft.rglob("*"):
            sync(file)
        sync(draft)
        os.replace(draft, path)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    sync(path.parent)
