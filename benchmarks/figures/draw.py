"""Draws the figures."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.figures.numbers import Numbers
from benchmarks.figures.style import Colours

TITLES = {
    "banking77": "banking77: exact match, %   (higher is better)",
    "gsm8k": "GSM8K: loss of the answer   (lower is better)",
}
MILLIONS = (0.2, 0.5, 1, 2, 5)


def aslora(numbers: Numbers, colours: Colours) -> Figure:
    """Two panels: what a task's metric is, by the number of values that an adapter keeps."""
    figure = Figure(figsize=(9.6, 3.3), layout="constrained")
    for axes, panel in zip(figure.subplots(1, 2), numbers["panels"], strict=True):
        for point in panel["points"]:
            label = point["label"]
            ours, lora = label.startswith("ASLoRA"), label.startswith("LoRA")
            colour = colours.blue if ours else colours.orange if lora else colours.grey
            marker = "o" if ours else "s" if lora else "D"
            axes.plot(point["values"], point["mean"], marker, color=colour, markersize=6)
            if point["interval"] is not None:
                axes.plot([point["values"]] * 2, point["interval"], color=colour, linewidth=1.6)
            # Pairs of points stand close: ours is named at the left of its lower end, others at the right of the upper.
            axes.annotate(
                label + short(point["n"], numbers["planned"]),
                (point["values"], (point["interval"] or [point["mean"]] * 2)[0 if ours else 1]),
                xytext=(-6 if ours else 6, 0), textcoords="offset points", color=colour,
                ha="right" if ours else "left", va="bottom" if ours else "top",
            )  # fmt: skip
        axes.set(title=TITLES[panel["task"]], xscale="log", xlim=(1.4e5, 6.5e6))
        axes.set_xlabel("values at the end of training, millions")
        axes.set_xticks([1e6 * each for each in MILLIONS], [f"{each:g}" for each in MILLIONS])
        axes.minorticks_off()
        axes.grid(axis="y")
    return figure


def meft(numbers: Numbers, colours: Colours) -> Figure:
    """Left: recall against forgetting at each rate tried. Right: forgetting of the reported seeds, and their recall."""
    figure = Figure(figsize=(9.6, 3.3), layout="constrained")
    frontier, reported = figure.subplots(1, 2, width_ratios=[1.15, 1])
    methods = numbers["methods"]
    of = (colours.blue, colours.orange, colours.grey, colours.yellow, colours.sky, colours.green, colours.purple)
    seen, markers = of[: len(methods)], "osD^vP*"[: len(methods)]
    for place, (one, colour, marker) in enumerate(zip(methods, seen, markers, strict=True)):
        recalls, forgettings = zip(*one["frontier"], strict=True) if one["frontier"] else ((), ())
        frontier.plot(recalls, forgettings, "-", marker=marker, color=colour, markersize=5, linewidth=1.4)
        if "forgetting" in one:
            _reported(reported, place, one["forgetting"], colour, marker)
    highest = highest_shown(numbers)
    if highest > 0:
        lowest = min(y for one in methods for _, y in one["frontier"])
        frontier.set_ylim(top=1.1 * highest, bottom=min(0.0, lowest) - 0.05 * highest)  # points at 0 are seen whole
    frontier.axvline(100 * numbers["least_recall"], color=colours.faint, linewidth=1, linestyle="--")
    frontier.set(title="Each learning rate tried (one seed)", xlim=(0, 103), xlabel="facts recalled, %")
    frontier.set_ylabel("forgetting, nats a token")
    frontier.grid()
    reported.set_yticks(range(len(methods)), [named(one, numbers["planned"]) for one in methods])
    for tick, colour in zip(reported.get_yticklabels(), seen, strict=True):
        tick.set_color(colour)
    reported.tick_params(axis="y", length=0)
    reported.set(title="The rate chosen, on other seeds", ylim=(len(methods) - 0.4, -0.6))
    reported.set_xlabel("forgetting, nats a token   (lower is better)")
    reported.axvline(0, color=colours.faint, linewidth=1)
    reported.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    reported.grid(axis="x")
    return figure


def highest_shown(numbers: Numbers) -> float:
    """The most forgetting that the left panel shows: twice that of the method that forgets most at the best of its
    rates that recall enough. Lines leave it at rates that nobody would choose. 0 where no rate recalls enough."""
    least = 100 * numbers["least_recall"]
    enough = [
        min((y for x, y in one["frontier"] if x >= least), default=0.0) for one in numbers["methods"] if one["frontier"]
    ]
    return 2 * max(enough, default=0.0)


def named(one: Numbers, planned: int) -> str:
    """A method, and what it recalls."""
    if "recall" not in one:
        return f"{one['label']}\nnot measured"
    return f"{one['label']}\nrecalls {one['recall']['mean']:.0f} %{short(one['recall']['n'], planned)}"


def _reported(axes: Any, place: int, found: Numbers, colour: str, marker: str) -> None:
    axes.plot(found["mean"], place, marker, color=colour, markersize=6)
    if found["interval"] is not None:
        axes.plot(found["interval"], [place] * 2, color=colour, linewidth=1.6)


def short(n: int, planned: int) -> str:
    """That seeds are missing, where they are."""
    return "" if n == planned else f" ({n} of {planned} seeds)"
