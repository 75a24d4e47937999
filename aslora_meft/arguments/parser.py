"""The parser of a command with many arguments: a short help and a whole one, and suggestions for unknown words."""

import argparse
import difflib
from collections.abc import Sequence
from typing import Any

from transformers import HfArgumentParser

from aslora_meft.errors import RaisingParser, UsageError


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.required else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """One spelling of a name is enough."""
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        name = next((name for name in action.option_strings if "-" not in name[2:]), action.option_strings[0])
        return f"{name} {self._format_args(action, self._get_default_metavar_for_optional(action))}"


class CommandParser(RaisingParser, HfArgumentParser):
    """A parser whose ``--help`` shows what is required and common, and whose ``--help-all`` shows everything.

    Underscores and dashes are the same in names.

    Args:
        groups: dataclasses whose fields are arguments.
        common: names of the arguments that ``--help`` shows beside the required ones, in this order.
    """

    def __init__(
        self, groups: Sequence[Any], *, prog: str, usage: str, description: str, example: str, common: Sequence[str]
    ) -> None:
        super().__init__(
            groups,
            prog=prog,
            usage=usage,
            description=f"{description}\nUnderscores and dashes in names are the same.",
            epilog=f"example:\n  {example}",
            formatter_class=_Formatter,
            allow_abbrev=False,
            add_help=False,
        )
        self.common = common
        group = self.add_argument_group("help")
        group.add_argument("-h", "--help", action=_Help, nargs=0, default=argparse.SUPPRESS, help="the short help")
        group.add_argument(
            "--help-all", "--help_all", action=_Help, nargs=0, default=argparse.SUPPRESS, help="this help"
        )

    def read(self, argv: Sequence[str]) -> dict[str, Any]:
        """Parse ``argv``.

        Returns:
            Name -> value; names whose default is ``argparse.SUPPRESS`` only where they are given.

        Raises:
            UsageError: an unknown or missing argument, or a value of the wrong type.
        """
        namespace, unknown = self.parse_known_args(argv)
        if unknown:
            raise UsageError(f"unknown argument {unknown[0]!r}; {self.suggestion(unknown[0])}")
        return vars(namespace)

    def names(self) -> list[str]:
        """The arguments' names, with underscores."""
        return [action.dest for action in self._actions if not isinstance(action, _Help)]

    def suggestion(self, word: str) -> str:
        """What may be meant by an unknown word."""
        name = word.lstrip("-").partition("=")[0].replace("-", "_")
        names = list(dict.fromkeys(self.names()))
        close = difflib.get_close_matches(name, names, n=2) or [n for n in names if name in n.split("_")][:2]
        if not close:
            return f"{self.prog} --help-all lists the arguments"
        return f"did you mean {' or '.join(map(repr, close))}?"

    def short_help(self) -> str:
        """The required and the common arguments alone."""
        actions = {action.dest: action for action in reversed(self._actions)}  # of a bool with its --no_, the first
        short = argparse.ArgumentParser(
            prog=self.prog,
            usage=self.usage,
            description=self.description,
            epilog=f"{self.epilog}\n\n{self.prog} --help-all lists all {len(set(self.names()))} arguments.",
            formatter_class=_Formatter,
            add_help=False,
        )
        required = short.add_argument_group("required")
        for action in self._actions:
            if action.required:
                required._add_action(action)
        common = short.add_argument_group("common")
        for name in self.common:
            common._add_action(actions[name])
        return short.format_help()


class _Help(argparse.Action):
    """Prints a help and ends."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        print(parser.format_help() if option_string in ("--help-all", "--help_all") else parser.short_help(), end="")
        parser.exit()
