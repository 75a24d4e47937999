"""How the figures look on a light and on a dark page, and how one becomes a file."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks.figures.numbers import Numbers


@dataclass(frozen=True)
class Colours:
    """Those of Okabe and Ito, which differ for colour-blind readers too, in the shades that a page needs."""

    ink: str
    faint: str
    blue: str
    orange: str
    grey: str
    yellow: str
    sky: str
    green: str
    purple: str

    @property
    def looks(self) -> list[tuple[str, str]]:
        """Colour and marker of methods that share a figure, in their order."""
        of = (self.blue, self.orange, self.grey, self.yellow, self.sky, self.green, self.purple)
        return [(of[i % len(of)], marker) for i, marker in enumerate("osD^vP*X<>")]


THEMES = {
    "light": Colours("#1f2328", "#d0d7de", "#0072b2", "#c44e00", "#6e7781", "#b8860b", "#3a9bd9", "#00805c", "#a3448f"),
    "dark": Colours("#e6edf3", "#3d444d", "#56b4e9", "#ff8c42", "#9198a1", "#e3b341", "#9bd3f5", "#2ccf9e", "#e38fc0"),
}


def settings(colours: Colours) -> dict[str, Any]:
    """matplotlib's, of a figure that stands on the page's own background."""
    return {
        "svg.hashsalt": "aslora-meft",
        "svg.fonttype": "none",
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "grid.color": colours.faint,
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), colours.ink),
    }


def svg(draw: Callable[[Numbers, Colours], Figure], numbers: Numbers, theme: str) -> bytes:
    """A figure as SVG, with its numbers as its description. The same bytes on every run."""
    colours = THEMES[theme]
    target = io.BytesIO()
    with matplotlib.rc_context(settings(colours)):
        about = {"Description": json.dumps(numbers), "Date": None, "Creator": None}
        draw(numbers, colours).savefig(target, format="svg", metadata=about)
    text = target.getvalue().replace(b"'DejaVu Sans'", b"'DejaVu Sans', Verdana, sans-serif")
    # Trailing blanks would be stripped by editors.
    return b"\n".join(line.rstrip() for line in text.splitlines()) + b"\n"
