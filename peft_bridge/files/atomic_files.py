"""Files and folders that are replaced whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


# A draft's name says whose it is: .aslora-meft.<machine>.<process>.<32 hexadecimal digits>
_DRAFT = ".aslora-meft"
_DRAFT_NAME = re.compile(re.escape(_DRAFT) + r"[.]([0-9a-f]{8})[.](\d+)[.][0-9a-f]{32}")


def _machine() -> str:
    """Eight digits for this machine: process ids of another one, on a shared disk, say nothing here."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _draft_in(folder: Path) -> Path:
    return folder / f"{_DRAFT}.{_machine()}.{os.getpid()}.{uuid.uuid4().hex}"


def remove_left_drafts(folder: Path) -> None:
    """Remove what processes of this machine that were killed have left in `folder`; those that run keep theirs."""
    for path in folder.glob(f"{_DRAFT}.*"):
        name = _DRAFT_NAME.fullmatch(path.name)
        if name is None or name[1] != _machine() or process_runs(name[2]):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def replace_file(path: str | os.PathLike, data: bytes) -> None:
    """Write `data` to `path` so that a reader, or a process killed at any point, sees the old or the new file whole."""
    path = Path(path)
    draft = _draft_in(path.parent)
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # mkstemp's 0o600 would hide it from a team
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)  # if it was replaced already, it is not there
        raise
    remove_left_drafts(path.parent)
    sync(path.parent)


@contextmanager
def folder_replaced_at_once(path: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder beside `path` that takes its place when the block ends without an exception.

    What is written gets the permissions that the process's umask leaves.

    Raises:
        ValueError: `path` exists and is not an empty folder (nothing of it is touched).
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"output folder '{path}' exists and is not empty: choose another one or remove it first.")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_left_drafts(path.parent)
    draft = _draft_in(path.parent)
    draft.mkdir()  # mkdtemp's 0o700 would hide it from a team
    try:
        yield draft
        folder_mode = stat.S_IMODE(draft.stat().st_mode)
        for file in draft.rglob("*"):
            # Some writers make their files private.
            file.chmod(folder_mode if file.is_dir() else folder_mode & 0o666)
            sync(file)
        sync(draft)
        os.replace(draft, path)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    sync(path.parent)
