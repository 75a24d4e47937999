"""Figures of what every Trainer logs: losses, learning rate, speed and memory; one or two runs in each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from aslora_meft.report.run_folder import Run
from aslora_meft.report.style import DEVICE, HOST, RUNS, Drawing, from_zero, new_figure, steps_axis

_SIZE = (6.4, 3.4)
_MARKED = 40  # points; of more, markers would lie on each other


def curves(runs: Sequence[Run]) -> list[Drawing]:
    """The figures for which there are numbers."""
    return [drawing for draw in (_losses, _learning_rate, _speed, _memory) if (drawing := draw(runs)) is not None]


def finite(run: Run, name: str) -> tuple[list[float], list[float]]:
    """A run's series without what is not finite."""
    steps, values = run.series(name)
    kept = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    return [step for step, _ in kept], [value for _, value in kept]


def plot(axes: Any, steps: list[float], values: list[float], **fields: Any) -> None:
    """A line, with markers where there are few points."""
    axes.plot(steps, values, marker="o" if len(steps) <= _MARKED else None, markersize=3, **fields)


def _losses(runs: Sequence[Run]) -> Drawing | None:
    if not any(finite(run, name)[0] for run in runs for name in ("loss", "eval_loss")):
        return None
    figure, axes = new_figure(*_SIZE)
    told = []
    for run, colour in zip(runs, RUNS, strict=False):
        whose = f" of {run.name}" if len(runs) > 1 else ""
        steps, values = finite(run, "loss")
        if steps:
            plot(axes, steps, values, color=colour, label=f"training{whose}")
            told.append(f"training loss{whose} from {values[0]:.3g} to {values[-1]:.3g}")
        steps, values = finite(run, "eval_loss")
        if steps:
            line = {"color": colour, "linestyle": "--", "marker": "D", "markersize": 5, "markerfacecolor": "none"}
            axes.plot(steps, values, label=f"held out{whose}", **line)
            told.append(f"held-out loss{whose} from {values[0]:.3g} to {values[-1]:.3g}")
    steps_axis(axes)
    by_token = all(run.results.get("task", "sft") in ("sft", "seq2seq") for run in runs)
    axes.set_ylabel("loss (nats per token)" if by_token else "loss")
    axes.legend()
    caption = "A training loss is the mean since the log before it; a held-out loss is of the step at which it stands."
    return Drawing("loss", "Loss", figure, f"Line chart: {'; '.join(told)}.", caption)


def _single(runs: Sequence[Run], name: str, key: str, title: str, label: str, caption: str = "") -> Drawing | None:
    if not any(finite(run, name)[0] for run in runs):
        return None
    figure, axes = new_figure(*_SIZE)
    told = []
    for run, colour in zip(runs, RUNS, strict=False):
        steps, values = finite(run, name)
        if steps:
            style = "-" if colour == RUNS[0] else "--"  # curves of two runs may be equal
            plot(axes, steps, values, color=colour, linestyle=style, label=run.name)
            told.append(f"{run.name}: {values[0]:.3g} at first, at most {max(values):.3g}, {values[-1]:.3g} at last")
    steps_axis(axes)
    axes.set_ylabel(label)
    from_zero(axes)
    if len(told) > 1:
        axes.legend()
    return Drawing(key, title, figure, f"Line chart of the {title.lower()}. {'; '.join(told)}.", caption)


def _learning_rate(runs: Sequence[Run]) -> Drawing | None:
    return _single(runs, "learning_rate", "learning_rate", "Learning rate", "learning rate")


def _speed(runs: Sequence[Run]) -> Drawing | None:
    caption = "Of all processes; without evaluation and saving."
    return _single(runs, "tokens_per_second", "speed", "Speed", "tokens per second", caption)


def _memory(runs: Sequence[Run]) -> Drawing | None:
    names = {"memory/host_gib": ("host, resident", "-"), "memory/device_gib": ("device, peak", "--")}
    if not any(finite(run, name)[0] for run in runs for name in names):
        return None
    figure, axes = new_figure(*_SIZE)
    told = []
    for run, colour in zip(runs, RUNS, strict=False):
        for name, (what, style) in names.items():
            steps, values = finite(run, name)
            if steps:
                own = colour if len(runs) > 1 else (HOST if style == "-" else DEVICE)
                label = f"{what}, {run.name}" if len(runs) > 1 else what
                plot(axes, steps, values, color=own, linestyle=style, label=label)
                told.append(f"{label}: at most {max(values):.3g} GiB")
    steps_axis(axes)
    axes.set_ylabel("memory (GiB)")
    from_zero(axes)
    axes.legend()
    caption = "Host: resident memory of the process. Device: PyTorch's peak so far."
    return Drawing("memory", "Memory", figure, f"Line chart of memory. {'; '.join(told)}.", caption)
