"""``aslora-meft run -- PROGRAM ...``: a Python program in a process in which PEFT knows both methods."""

import importlib
import importlib.metadata
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

from aslora_meft.errors import UsageError


def run(argv: list[str]) -> None:
    """Run a Python file, a module, or a command that a package has installed, as Python would.

    Args:
        argv: the program and its arguments, perhaps after ``--`` or ``-m``.

    Raises:
        UsageError: there is no such program.
    """
    words = argv[1:] if argv[:1] == ["--"] else argv
    as_module = words[:1] == ["-m"]
    words = words[1:] if as_module else words
    if not words:
        raise UsageError("run: no program is given; write aslora-meft run -- PROGRAM ARGUMENTS")
    program = words[0]
    importlib.import_module("aslora")
    importlib.import_module("meft")
    sys.argv = words
    if not as_module and Path(program).is_file():
        sys.path.insert(0, str(Path(program).resolve().parent))
        runpy.run_path(program, run_name="__main__")
        return
    commands = [] if as_module else importlib.metadata.entry_points(group="console_scripts", name=program)
    for command in commands:
        raise SystemExit(command.load()())
    try:
        found = find_spec(program) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        raise UsageError(
            f"run: {program!r} is no Python file, module or command of a package; give one (programs in other "
            "languages cannot be run so)"
        )
    sys.path.insert(0, "")
    runpy.run_module(program, run_name="__main__", alter_sys=True)
