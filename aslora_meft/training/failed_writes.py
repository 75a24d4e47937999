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
from aslora_meft.training.run_record import RECORD

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FAILING = {errno.EROFS, errno.EIO, errno.ESTALE}
# What any file can give that is absent or not allowed: only of a file in the run's folder it is a failed write.
_OF_A_FILE = {errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR}
# safetensors and tokenizers, written in Rust, raise an Exception with the number; torch's writer tells no reason.
_NUMBER = re.compile(r"\(os error (\d+)\)")
_RUST_WRITES = "Error while serializing"
_TORCH = ("PytorchStreamWriter failed writing", "unexpected pos ", "iostream error")
_TORCHS_REASON = "the disk is full, or fails"


def write_failure(error: BaseException, output: Path) -> str | None:
    """Why a file in `output` could not be written, in the operating system's words; None if an error says otherwise."""
    seen: BaseException | None = error
    told = None
    while seen is not None:
        code = _failed_code(seen, output)
        if code is not None:
            return os.strerror(code)
        if any(words in str(seen) for words in _TORCH):
            told = _TORCHS_REASON
        seen = seen.__cause__ if seen.__cause__ is not None or seen.__suppress_context__ else seen.__context__
    return told


def _failed_code(error: BaseException, output: Path) -> int | None:
    if isinstance(error, OSError):
        named = isinstance(error.filename, str | bytes | os.PathLike)
        here = named and Path(os.fsdecode(error.filename)).resolve().is_relative_to(output.resolve())
        counted = here or (not named and error.errno not in _OF_A_FILE)
        code = error.errno
    else:
        number = _NUMBER.search(str(error))
        code = int(number[1]) if number else None
        counted = code not in _OF_A_FILE or _RUST_WRITES in str(error)
    return code if counted and code in _FULL | _FAILING | _OF_A_FILE else None


class RunFolder:
    """The folder of a run, in which a failed write leaves only what is whole.

    Attributes:
        adapter_saved: whether the adapter is whole in it, with all that it needs.
    """

    def __init__(self, output_dir: str) -> None:
        """Note what is there before the run."""
        self.adapter_saved = False
        self._output = Path(output_dir)
        self._before = self._entries()

    def _entries(self) -> set[Path]:
        return set(self._output.iterdir()) if self._output.is_dir() else set()

    @contextmanager
    def nothing_half_written(self) -> Iterator[None]:
        """Of what the run has written, keep all; or, where a write fails, an adapter or checkpoints that are whole.

        Raises:
            UsageError: a write failed: why, what is saved, and how to go on.
        """
        try:
            yield
        except Exception as error:
            why = write_failure(error, self._output)
            if why is None or isinstance(error, UsageError):
                raise
            full = why == _TORCHS_REASON or why in map(os.strerror, _FULL)
            mend = "free the disk" if full else "make it writable"
            raise UsageError(f"output_dir='{self._output}' cannot be written: {why}; {self._clean(mend)}") from error

    def _clean(self, mend: str) -> str:
        """Remove what is not whole; returns what is saved, and the remedy."""
        whole = None
        with suppress(OSError):
            whole, torn = last_whole(self._output)
            if not self.adapter_saved:
                self._remove(keep_run=whole is not None, torn=set(torn))
        resume = f"{mend} and run the same command with --resume_from_checkpoint last"
        if self.adapter_saved:
            again = resume if whole is not None else f"{mend} and run the same command with another output_dir"
            return f"the adapter is saved, and results.json or the model card is not: to have them, {again}"
        if whole is not None:
            return f"{whole} is whole, {resume}"
        if self._entries() - self._before:
            return f"nothing was saved, {mend} and run the same command with another output_dir"
        return f"nothing was saved, {mend} and run the same command again"

    def _remove(self, *, keep_run: bool, torn: set[Path]) -> None:
        """Remove what is new: all, or only the files and checkpoints that are of no use to a run that resumes."""
        for path in self._entries() - self._before:
            if path.is_dir() and not path.is_symlink():
                if not keep_run or path in torn:
                    shutil.rmtree(path, ignore_errors=True)
            elif not keep_run or path.name != RECORD:
                path.unlink()
