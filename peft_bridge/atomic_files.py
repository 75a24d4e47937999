"""Files and folders that are replaced whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What says that a folder cannot be synced here: Windows opens none, some network file systems sync none.
_NO_SYNC = {errno.EACCES, errno.EBADF, errno.EINVAL, errno.EISDIR, errno.ENOSYS, errno.ENOTSUP, errno.EPERM}


def sync(path: Path) -> None:
    """Force a file or folder to the disk, so that a rename cannot overtake the data.

    A folder is left alone where it cannot be synced.

    Raises:
        OSError: the disk failed.
    """
    folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if not folder or error.errno not in _NO_SYNC:
            raise


def process_runs(process: str) -> bool:
    """Whether a process of this machine is alive (another rank may be saving into the same folder)."""
    if not process.isdigit():
        return False
    if os.name == "nt":
        return True  # there is no harmless signal
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


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
        name.unlink(missing_ok=True)  # if it was replaced already, it is not there
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
