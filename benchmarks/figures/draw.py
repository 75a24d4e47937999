"""Draws the figures."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from benchmarks.figures.numbers import Numbers
from benchmarks.figures.style import Colours

GAINS = {"loss": "gain of loss over {}, %", "accuracy": "gain of accuracy over {}, points"}


def aslora(numbers: Numbers, colours: Colours) -> Figure:
    """Two panels, loss and accuracy: what each method gains over LoRA r 8 on each task, and the margin of a gain that
    counts.
    """
    tasks = numbers["tasks"]
    points = [point for task in tasks for point in task["points"]]
    shares = {point["label"]: point["values"] for point in points}  # in the order of the settings
    looks = dict(zip(shares, colours.looks, strict=False))
    figure = Figure(figsize=(9.6, 1.3 + 0.55 * len(tasks) * max(1.0, len(shares) / 3)), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2, sharey=True), GAINS, strict=True):
        margin = numbers["margins"][metric]
        axes.axvspan(-margin, margin, color=colours.faint, alpha=0.5, linewidth=0)
        axes.axvline(0, color=colours.ink, linewidth=0.8)
        for place, task in enumerate(tasks):
            if not task["points"]:
                axes.text(0, place, "  not measured", va="center", color=colours.grey)
            for point in task["points"]:
                colour, marker = looks[point["label"]]
                y = place + 0.7 * ((list(shares).index(point["label"]) + 0.5) / len(shares) - 0.5)
                axes.plot(point[metric]["interval"], [y, y], color=colour, linewidth=1.6)
                axes.plot(point[metric]["mean"], y, marker, color=colour, markersize=6)
        axes.set_xlabel(GAINS[metric].format(numbers["rival"]) + "   (higher is better)")
        axes.grid(axis="x")
    axes.set_yticks(range(len(tasks)), [task["task"] for task in tasks])
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    handles = [
        Line2D([], [], color=colour, marker=marker, linewidth=1.6, label=f"{label}, {shares[label]:g} % of the values")
        for label, (colour, marker) in looks.items()
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False)
    return figure


def meft(numbers: Numbers, colours: Colours) -> Figure:
    """Left: recall against forgetting at each rate tried. Right: forgetting of the reported seeds, and their recall."""
    figure = Figure(figsize=(9.6, 3.3), layout="constrained")
    frontier, reported = figure.subplots(1, 2, width_ratios=[1.15, 1])
    methods = numbers["methods"]
    looks = colours.looks[: len(methods)]
    for place, (one, (colour, marker)) in enumerate(zip(methods, looks, strict=True)):
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
    for tick, (colour, _) in zip(reported.get_yticklabels(), looks, strict=True):
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
