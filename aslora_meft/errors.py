"""What the command line says when its input is wrong."""

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

_LONGEST = 300  # characters of a library's message


class UsageError(ValueError):
    """Bad input: one sentence that names the field, the value and the remedy. The command line exits with code 2."""

    def __init__(self, message: str) -> None:
        cut = f"{message[:400]} ... {message[-200:]}" if len(message) > 800 else message
        super().__init__("".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in cut))


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
        raise UsageError(prefix + _sentence(error)) from error


def _sentence(error: Exception) -> str:
    """A library's message in one line, up to the end of a sentence where it is long."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= _LONGEST else message[: message.find(". ", 80, _LONGEST) + 1] or message


class RaisingParser(argparse.ArgumentParser):
    """An ArgumentParser that raises :class:`UsageError` instead of printing its usage and ending the process."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse words; `--name=--`, of which argparse makes an empty list without looking at its type, is refused."""
        for word in args or []:
            name = word[:-3]
            if word.endswith("=--") and any(
                option == name or (self.allow_abbrev and re.match(r"--\w", name) and option.startswith(name))
                for option in self._option_string_actions
            ):
                self.error(f"argument {name}: '--' is no value; give one")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found wrong."""
        raise UsageError(f"{message} (see {self.prog} --help)")
