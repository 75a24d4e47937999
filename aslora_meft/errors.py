"""What the command line says when its input is wrong."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class UsageError(ValueError):
    """Bad input: one sentence that names the field, the value and the remedy. The command line exits with code 2."""


@contextmanager
def as_usage_error(*errors: type[Exception], prefix: str = "") -> Iterator[None]:
    """Turn ``errors`` raised by a library's own validation of user input into a one-line :class:`UsageError`.

    Wrap only the call that validates: anything else keeps its traceback.
    """
    try:
        yield
    except UsageError:
        raise
    except errors as error:
        raise UsageError(prefix + " ".join(str(error).split())) from error


class RaisingParser(argparse.ArgumentParser):
    """An ArgumentParser that raises :class:`UsageError` instead of printing its usage and ending the process."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found wrong."""
        raise UsageError(f"{message} (see {self.prog} --help)")
