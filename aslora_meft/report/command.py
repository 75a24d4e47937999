"""The command `aslora-meft report`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from aslora_meft.arguments.checks import check_output
from aslora_meft.arguments.text import local_path
from aslora_meft.errors import RaisingParser, UsageError, as_usage_error
from peft_bridge import replace_file

REPORT = "report.html"


def run(argv: Sequence[str]) -> None:
    """Run the command.

    Raises:
        UsageError: one sentence: no run, no matplotlib, or a file that cannot be written.
    """
    options = _parser().parse_args(argv)
    if len(options.runs) > 2:
        raise UsageError(f"report takes one run or two, and {len(options.runs)} are given")
    page, figures = write_report(options.runs, options.output)
    print(f"Report: {page.resolve()}\nFigures: {figures.resolve()}")


def write_report(runs: Sequence[str], output: str | None = None) -> tuple[Path, Path]:
    """Write the page of one run, or of two side by side, and its figures as PNGs.

    Args:
        runs: the folders.
        output: the page; None: `report.html` in the first folder. The PNGs go into a folder of its name with
            `-figures`.

    Returns:
        the page, and the folder of the PNGs.

    Raises:
        UsageError: as `run`.
    """
    if find_spec("matplotlib") is None:
        raise UsageError("report needs matplotlib, which is not installed; pip install 'aslora-meft[report]'")
    from aslora_meft.report.curves import curves
    from aslora_meft.report.page import page
    from aslora_meft.report.routing_figures import routing_figures
    from aslora_meft.report.run_folder import read_run
    from aslora_meft.report.sharing_figures import sharing_figures
    from aslora_meft.report.style import figure_style, png

    found = [read_run("RUN_DIR", value) for value in runs]
    if len(found) > 1 and found[0].name == found[1].name:
        for number, one in enumerate(found, 1):
            one.name = f"{one.name} ({number})"
    path = _page_path(found[0].folder, output)
    figures = path.with_name(f"{path.stem}-figures")
    check_output("the figures' folder", str(figures))
    with figure_style():
        drawings = curves(found)
        for number, one in enumerate(found):
            drawings += sharing_figures(one, number) + routing_figures(one, number)
        text = page(found, drawings)
        pictures = {f"{drawing.key}.png": png(drawing) for drawing in drawings}
    with as_usage_error(OSError, prefix=f"output={str(path)!r} cannot be written: "):
        figures.mkdir(parents=True, exist_ok=True)
        for name, content in pictures.items():
            replace_file(figures / name, content)
        replace_file(path, text.encode(errors="replace"))  # names in JSON can hold half of a surrogate pair
    return path, figures


def _page_path(folder: Path, output: str | None) -> Path:
    path = folder / REPORT if output is None else local_path("output", output)
    if path.is_dir():
        raise UsageError(f"output={str(path)!r} is a folder; give the name of an HTML file")
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"output={str(path)!r} does not end with .html; give the name of an HTML file")
    return path


def _parser() -> RaisingParser:
    parser = RaisingParser(
        prog="aslora-meft report",
        usage="aslora-meft report RUN_DIR [RUN_DIR2] [--output FILE]",
        description="Write what happened in one run, or in two side by side, as one HTML page without links to other\n"
        "files, and its figures as PNGs: losses, learning rate, speed, memory; of ASLoRA the merges, of MEFT the use\n"
        "of experts and neurons. Runs that have not ended are shown as far as they came.",
        epilog="example:\n  aslora-meft report out\n  aslora-meft report first second --output comparison.html",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="the output_dir of a training run")
    parser.add_argument("--output", metavar="FILE", help="the page (default: report.html in RUN_DIR)")
    return parser
