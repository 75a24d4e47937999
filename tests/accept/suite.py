"""PEFT's own tests: fetched once as the source distribution of the installed version, copied with their gates opened.

The copy lives in a temporary folder. Nothing of PEFT's tests is kept in the project.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gates import CLOSED, FILES, IMPORTS, OPENED

CACHE = Path(__file__).parents[2] / ".cache" / "peft-tests"
_LORA_NAMES = {"LoraConfig", "LoraLayer"}


class SuiteError(Exception):
    """PEFT's tests are not as the harness knows them; the message says where."""


def fetch() -> Path:
    """The folder with the tests of the installed PEFT; downloaded from the package index on first use.

    Raises:
        SuiteError: the download failed.
    """
    name = f"peft-{version('peft')}"
    folder = CACHE / name
    if folder.is_dir():
        return folder / "tests"
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as draft:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        requirement = name.replace("-", "==", 1)
        done = subprocess.run([*pip, "--no-binary=:all:", "--dest", draft, requirement], check=False)
        if done.returncode:
            raise SuiteError(
                f"The source distribution of {requirement}, which carries PEFT's tests, was not downloaded."
            )
        with tarfile.open(Path(draft, f"{name}.tar.gz")) as tar:
            tests = [member for member in tar if member.name.startswith(f"{name}/tests/")]
            checked: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # not before 3.11.4
            tar.extractall(draft, members=tests, **checked)
        try:
            Path(draft, name).rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return folder / "tests"


def copy_with_open_gates(source: Path, target: Path) -> int:
    """Write the files that are run to package `target`, and return the number of gates opened.

    Raises:
        SuiteError: a gate is not where it was, or there is one that the harness does not know.
    """
    target.mkdir()
    (target / "__init__.py").touch()
    opened = 0
    for name in FILES:
        text = (source / name).read_text()
        spans: list[tuple[int, int]] = []
        for before, after, count in OPENED.get(name, []):
            if text.count(before) != count:
                raise SuiteError(f"{name}: gate `{before}` was found {text.count(before)} times, not {count}.")
            start = -1
            while (start := text.find(before, start + 1)) >= 0:
                line = text.count("\n", 0, start) + 1
                spans.append((line, line + before.count("\n")))
            text = text.replace(before, after)  # as many lines as before, so that tracebacks point into PEFT's file
            opened += count
        _check_known(name, (source / name).read_text(), spans)
        text = text.replace("\nfrom peft import ", f"\n{IMPORTS}; from peft import ", 1)
        (target / name).write_text(text)
    return opened


def _check_known(name: str, text: str, opened: list[tuple[int, int]]) -> None:
    """Every comparison with LoRA's classes must be one that was opened, or stand in the list of those left closed."""
    closed = set()
    for node in ast.walk(ast.parse(text)):
        is_check = isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass")
        if not (is_check or isinstance(node, ast.Compare)) or not _names_of(node) & _LORA_NAMES:
            continue
        if any(first <= node.lineno <= last for first, last in opened):
            continue
        source = ast.unparse(node)
        if source not in CLOSED.get(name, {}):
            raise SuiteError(f"{name}, line {node.lineno}: unknown gate `{source}`; open it or list it as closed.")
        closed.add(source)
    if gone := set(CLOSED.get(name, {})) - closed:
        raise SuiteError(f"{name}: gates listed as closed were not found: {sorted(gone)}.")


def _names_of(node: ast.AST) -> set[str]:
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return names | {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
