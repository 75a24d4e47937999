"""Figures of MEFT: how evenly experts and neurons are used, and what crosses between host and device."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, PercentFormatter

from aslora_meft.report.curves import finite, plot
from aslora_meft.report.routing import LayerUse
from aslora_meft.report.run_folder import Run
from aslora_meft.report.style import COLOURS, DEVICE, HOST, RUNS, Drawing, from_zero, new_figure, steps_axis
from aslora_meft.training.run_record import TOP_SHARES

_MOST_LABELS = 40
_TENTH = TOP_SHARES.index(0.1)


def routing_figures(run: Run, number: int) -> list[Drawing]:
    """The figures of a run; `number` is 0 for the first and 1 for the second run of a page."""
    drawings = [_over_layers(run, number), _experts(run, number), _top_rows(run, number)] if run.layer_use else []
    bytes_moved = _bytes(run, number)
    return [*drawings, bytes_moved] if bytes_moved is not None else drawings


def _layers(run: Run) -> list[str]:
    return list(dict.fromkeys(use.layer for use in run.layer_use))


def _short(path: str) -> str:
    return next((part for part in path.split(".") if part.isdigit()), path)


def _edges(steps: list[int]) -> list[float]:
    """The borders of the columns of a map: a record speaks of the steps since the one before it."""
    first = max(0, 2 * steps[0] - steps[1]) if len(steps) > 1 else 0
    return [first, *steps]


def _table(run: Run, layers: list[str], steps: list[int], value: Any) -> np.ma.MaskedArray:
    found = np.full((len(layers), len(steps)), np.nan)
    rows, columns = ({key: i for i, key in enumerate(keys)} for keys in (layers, steps))
    for use in run.layer_use:
        found[rows[use.layer], columns[use.step]] = value(use)
    return np.ma.masked_invalid(found)


def _map(figure: Any, axes: Any, steps: list[int], values: Any, label: str, **fields: Any) -> None:
    image = axes.pcolormesh(
        _edges(steps), np.arange(len(values) + 1) - 0.5, values, cmap=COLOURS, rasterized=True, **fields
    )
    axes.grid(False)
    steps_axis(axes)
    figure.colorbar(image, ax=axes, label=label)


def _over_layers(run: Run, number: int) -> Drawing:
    layers, steps = _layers(run), sorted({use.step for use in run.layer_use})
    share = _table(run, layers, steps, lambda use: use.union_share)
    busiest = _table(run, layers, steps, lambda use: use.busiest)
    figure, both = new_figure(9.6, 1.5 + 0.13 * min(len(layers), 60), ncols=2, sharey=True)
    _map(figure, both[0], steps, share, "|U| / r", vmin=0)
    _map(figure, both[1], steps, busiest, "busiest expert / even load", vmin=1)
    both[0].set_title("Neurons used, |U| / r")
    both[1].set_title("Load of the busiest expert")
    every = math.ceil(len(layers) / _MOST_LABELS)
    both[0].set_yticks(range(0, len(layers), every), [_short(path) for path in layers[::every]], fontsize=7)
    both[0].set_ylabel("layer")
    alt = (
        f"Two maps of {run.name}, {len(layers)} layers by steps: the share of neurons that a pass uses, from "
        f"{share.min():.3f} to {share.max():.3f}; the busiest expert's load beside an even one, from "
        f"{busiest.min():.2f} to {busiest.max():.2f}."
    )
    caption = "Means of the forward passes since the record before. 1 on the right: all experts get as many picks."
    return Drawing(f"layers_{number + 1}", "Use of neurons and experts, by layer", figure, alt, caption, number)


def _experts(run: Run, number: int) -> Drawing:
    """The experts over time, of the layer that is even in the middle of all, and of the least even one."""
    totals = {layer: np.zeros(0) for layer in _layers(run)}
    for use in run.layer_use:
        load = np.array(use.expert_load, dtype=float)
        totals[use.layer] = load + totals[use.layer] if len(totals[use.layer]) == len(load) else load
    uneven = sorted(totals, key=lambda layer: totals[layer].max() / max(1.0, totals[layer].mean()))
    chosen = list(dict.fromkeys([uneven[len(uneven) // 2], uneven[-1]]))
    figure, panels = new_figure(9.6, 3.6, ncols=len(chosen), squeeze=False)
    for axes, layer, what in zip(panels[0], chosen, ("the median layer", "the least even layer"), strict=False):
        uses = [u for u in run.layer_use if u.layer == layer and len(u.expert_load) == len(totals[layer])]
        order = np.argsort(-totals[layer], kind="stable")
        columns = [np.array(u.expert_load)[order] * len(order) / max(1, sum(u.expert_load)) for u in uses]
        _map(
            figure,
            axes,
            [u.step for u in uses],
            np.stack(columns, axis=1),
            "load / even load",
            norm=PowerNorm(0.4, vmin=0),
        )
        axes.invert_yaxis()
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.set_title(f"Layer {_short(layer)}, {what}")
    panels[0][0].set_ylabel("experts, by their total load")
    worst = totals[chosen[-1]]
    alt = (
        f"Maps of {len(worst)} experts by steps of {run.name}: in layer {_short(chosen[-1])}, the least even one, the "
        f"busiest expert gets {worst.max() / max(1.0, worst.mean()):.2f} times an even load, and "
        f"{(worst == 0).mean():.0%} of the experts get nothing."
    )
    caption = "A row is an expert, the busiest one of the whole run on top; 1 is an even load."
    return Drawing(f"experts_{number + 1}", "Load of the experts over time", figure, alt, caption, number)


def _shares(uses: list[LayerUse]) -> np.ndarray:
    """Share of the picks that each share of the neurons gets, a row a record."""
    whole = [use.top for use in uses if len(use.top) == len(TOP_SHARES) and use.top[-1] > 0]
    return np.array([[n / top[-1] for n in top] for top in whole]).reshape(-1, len(TOP_SHARES))


def _top_rows(run: Run, number: int) -> Drawing:
    steps = sorted({use.step for use in run.layer_use})
    by_step = {step: shares for step in steps if len(shares := _shares([u for u in run.layer_use if u.step == step]))}
    figure, (left, right) = new_figure(9.6, 3.4, ncols=2)
    told = "no picks"
    if by_step:
        last = by_step[max(by_step)]
        x = [100 * share for share in TOP_SHARES]
        band = {"color": RUNS[number], "alpha": 0.25, "linewidth": 0, "label": "all layers"}
        left.fill_between(x, 100 * last.min(0), 100 * last.max(0), **band)
        left.plot(x, 100 * np.median(last, 0), color=RUNS[number], marker="o", markersize=3, label="median layer")
        left.plot(x, x, color=RUNS[number], linestyle=":", linewidth=1, label="even use")
        tenth = {step: 100 * shares[:, _TENTH] for step, shares in by_step.items()}
        lows, highs, middles = ([f(v) for v in tenth.values()] for f in (np.min, np.max, np.median))
        right.fill_between(list(tenth), lows, highs, **band)
        plot(right, list(tenth), middles, color=RUNS[number], label="median layer")
        told = f"the most picked tenth of the neurons gets {middles[-1]:.0f} % of the picks in the median layer at last"
    left.set_xscale("log")
    left.xaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 20, 50, 100]))
    left.xaxis.set_minor_locator(NullLocator())
    left.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    left.set_xlabel("most picked neurons (share of r, log scale)")
    left.set_ylabel("share of picks")
    left.set_title("In the last record")
    steps_axis(right)
    right.set_title("The most picked tenth, over time")
    for axes in (left, right):
        axes.set_ylim(0, 102)
        axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    alt = f"Two charts of the picks that the most picked neurons of {run.name} get: {told}."
    caption = "Which neurons these are is decided anew in each record. The band spans all layers."
    return Drawing(f"top_rows_{number + 1}", "Picks of the most picked neurons", figure, alt, caption, number)


def _bytes(run: Run, number: int) -> Drawing | None:
    """MiB a step each way; None where nothing crossed."""
    figure, axes = new_figure(6.4, 3.0)
    told = []
    for name, label, colour in (
        ("meft/mib_to_device", "host to device", HOST),
        ("meft/mib_to_host", "device to host", DEVICE),
    ):
        steps, values = finite(run, name)
        spans = [step - before for step, before in zip(steps, [0.0, *steps], strict=False)]
        rates = [value / max(1.0, span) for value, span in zip(values, spans, strict=True)]
        if any(rates):
            plot(axes, steps, rates, color=colour, label=label)
            told.append(f"{label} {rates[-1]:,.1f} MiB a step at last")
    if not told:
        return None
    steps_axis(axes)
    axes.set_ylabel("MiB per optimizer step")
    from_zero(axes)
    axes.legend()
    alt = f"Line chart of the bytes that cross in {run.name}: {'; '.join(told)}."
    return Drawing(f"bytes_{number + 1}", "Bytes between host and device", figure, alt, "", number)
