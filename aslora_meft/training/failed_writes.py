"""A disk that is full, or cannot be written, in a run: one sentence, and nothing half-written stays."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from aslora_meft.errors import UsageError
from aslora_meft.training.checkpoints import last_whole

_ERRNOS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM),
    *(errno.ENOENT, errno.ENOTDIR, errno.ESTALE),
}
# safetensors and tokenizers, written in Rust, raise an Exception with the number; torch's writer tells no reason.
_NUMBER = re.compile(r"\(os error (\d+)\)")
_TORCH = ("PytorchStreamWriter failed writing", "unexpected pos ", "iostream error")


def write_failure(error: BaseException) -> str | None:
    """Why a file could not be written, in the operating system's words; None if an error says something else."""
    seen: BaseException | None = error
    told = None
    while seen is not None:
        number = _NUMBER.search(str(seen))
        code = seen.errno if isinstance(seen, OSError) else int(number[1]) if number else None
        if code in _ERRNOS:
            return os.strerror(code)
        if any(words in str(seen) for words in _TORCH):
            told = "the disk is full, or fails"
        seen = seen.__cause__ or seen.__context__
    return told


@contextmanager
def nothing_half_written(output_dir: str) -> Iterator[None]:
    """Of what the block writes into a run's folder, keep all; or, where a write fails, only whole checkpoints.

    Raises:
        UsageError: a write failed: why, and how to go on.
    """
    output = Path(output_dir)
    before = set(output.iterdir()) if output.is_dir() else set()
    try:
        yield
    except Exception as error:
        why = write_failure(error)
        if why is None or isinstance(error, UsageError):
            raise
        _remove_files(output, before)
        whole = _remove_torn(output, before)
        remedy = "nothing was saved, free the disk and run the same command again"
        if whole is not None:
            remedy = f"{whole} is whole, free the disk and run the same command with --resume_from_checkpoint last"
        raise UsageError(f"output_dir={output_dir!r} cannot be written: {why}; {remedy}") from error


def _remove_files(output: Path, before: set[Path]) -> None:
    with suppress(OSError):
        for path in set(output.iterdir()) - before:
            if not path.is_dir():
                path.unlink()


def _remove_torn(output: Path, before: set[Path]) -> Path | None:
    """Remove the checkpoints that are not whole and were not there; returns the newest whole one."""
    with suppress(OSError):
        whole, torn = last_whole(output)
        for path in set(torn) - before:
            shutil.rmtree(path, ignore_errors=True)
        return whole
    return None
