"""How figures look, and how one becomes part of a page: one drawing for light and for dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Drawn for white paper; in the page these two colours become the page's own.
INK, GRID = "#1f2937", "#d5dae1"
RUNS = ("#2f7fd0", "#e07b1a")  # of the first and the second run; seen well on white and on black
HOST, DEVICE = RUNS
COLOURS = "viridis"
_SETTINGS: dict[str, Any] = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "savefig.dpi": 150,
    "figure.facecolor": "white",
    "axes.facecolor": "none",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


class Drawing(NamedTuple):
    """A figure of a report.

    Attributes:
        key: its file's name without the ending.
        alt: what it shows, in a sentence with the numbers that matter.
        caption: how to read it.
        run: 0 or 1 for a figure of one run, None for one of all.
    """

    key: str
    title: str
    figure: Figure
    alt: str
    caption: str = ""
    run: int | None = None


@contextmanager
def figure_style() -> Iterator[None]:
    """The settings of all figures."""
    with matplotlib.rc_context(_SETTINGS):  # type: ignore[arg-type]  # it names all keys
        yield


def new_figure(width: float, height: float, **fields: Any) -> tuple[Figure, Any]:
    """A figure of so many inches, and its axes as `Figure.subplots` returns them."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**fields)


def steps_axis(axes: Any) -> None:
    """Optimizer steps, whole numbers."""
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def from_zero(axes: Any) -> None:
    """Let the vertical axis begin at zero, with room above the highest value."""
    axes.set_ylim(0, max(axes.dataLim.y1, 1e-12) * 1.08)


def png(drawing: Drawing) -> bytes:
    """The figure on white, for other documents."""
    buffer = io.BytesIO()
    drawing.figure.savefig(buffer, format="png", metadata={"Description": drawing.alt})
    return buffer.getvalue()


def svg(drawing: Drawing) -> str:
    """The figure as an element of a page: transparent, with the page's colours for ink and grid."""
    buffer = io.StringIO()
    # Ids of clip paths must differ between the figures of a page.
    with matplotlib.rc_context({"svg.hashsalt": f"{drawing.key}"}):
        drawing.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawing.figure.set_layout_engine("none")  # the places are found
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, _, body = text.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    prefix = f"{drawing.key}-"
    used = set(re.findall(r'(?:href="|url\()#([^")]*)', body))
    body = re.sub(r' id="([^"]*)"', lambda found: f' id="{prefix}{found[1]}"' if found[1] in used else "", body)
    body = re.sub(r'(href="|url\()#', rf"\1#{prefix}", body)
    body = body.replace(INK, "currentColor").replace(GRID, "var(--grid)")
    body = body.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    return f'<svg role="img" aria-labelledby="{prefix}title" {box[0] if box else ""}>{_title(drawing)}{body}'


def _title(drawing: Drawing) -> str:
    return f'<title id="{drawing.key}-title">{escape(drawing.alt)}</title>'
