"""Figures of ASLoRA: which layers merge, when and at what distance."""

from __future__ import annotations

import math
from typing import Any

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from aslora_meft.report.curves import finite
from aslora_meft.report.merge_map import Projection
from aslora_meft.report.run_folder import Run
from aslora_meft.report.style import COLOURS, INK, RUNS, Drawing, from_zero, new_figure, steps_axis

_MOST_LABELS = 48  # of layers on one axis


def sharing_figures(run: Run, number: int) -> list[Drawing]:
    """The figures of a run; `number` is 0 for the first and 1 for the second run of a page."""
    projections = [projection for projection in run.projections if projection.layers]
    drawings: list[Drawing] = []
    if any(projection.merges for projection in projections):
        drawings.append(_merge_map(run, projections, number))
    if (values := _values(run, number)) is not None:
        drawings.append(values)
    if any(projection.merges for projection in projections):
        drawings.append(_dendrograms(run, projections, number))
    return drawings


def _told(projections: list[Projection]) -> str:
    merges = [merge for projection in projections for merge in projection.merges]
    steps, distances = [m.step for m in merges], [m.distance for m in merges]
    return (
        f"{len(merges)} merges in {len(projections)} projections, from step {min(steps)} to {max(steps)}, at distances "
        f"from {min(distances):.3g} to {max(distances):.3g}"
    )


def _merge_map(run: Run, projections: list[Projection], number: int) -> Drawing:
    layers = sorted({layer for projection in projections for layer in projection.layers})
    place = {layer: row for row, layer in enumerate(layers)}
    when = np.full((len(layers), len(projections)), np.nan)
    distance = when.copy()
    for column, projection in enumerate(projections):
        for layer, merge in projection.joined().items():
            when[place[layer], column], distance[place[layer], column] = merge.step, merge.distance
    height = 1.6 + 0.15 * min(len(layers), 60)
    figure, both = new_figure(6.4, height, ncols=2, sharey=True)
    panels = ((when, "When", "optimizer step"), (distance, "At what distance", "distance (Frobenius norm)"))
    for axes, (values, title, label) in zip(both, panels, strict=True):
        image = axes.pcolormesh(
            np.arange(len(projections) + 1) - 0.5, np.arange(len(layers) + 1) - 0.5, np.ma.masked_invalid(values),
            cmap=COLOURS, rasterized=True,
        )  # fmt: skip
        axes.grid(False)
        axes.set_title(title)
        axes.set_xticks(range(len(projections)), [p.title.rpartition(".")[2] for p in projections], rotation=90)
        axes.set_xlabel("projection")
        figure.colorbar(image, ax=axes, label=label)
    every = math.ceil(len(layers) / _MOST_LABELS)
    both[0].set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]], fontsize=7)
    both[0].set_ylabel("layer")
    alt = f"Merge map of {run.name}, layers by projections: {_told(projections)}."
    caption = "The first merge by which a layer came to share its B. Empty: the layer still has a B of its own."
    return Drawing(f"merge_map_{number + 1}", "Merge map", figure, alt, caption, number)


def _dendrograms(run: Run, projections: list[Projection], number: int) -> Drawing:
    shown = [projection for projection in projections if projection.merges]
    longest = max(len(projection.layers) for projection in shown)
    columns = 1 if longest > 32 or len(shown) == 1 else 2
    rows = math.ceil(len(shown) / columns)
    figure, grid = new_figure(
        9.6 if columns == 2 else 8, 0.7 + 1.9 * rows, nrows=rows, ncols=columns, sharey=True, squeeze=False
    )
    distances = [merge.distance for projection in shown for merge in projection.merges]
    scale = Normalize(min(distances), max(distances) if max(distances) > min(distances) else min(distances) + 1)
    for axes, projection in zip(grid.flat, shown, strict=False):
        _dendrogram(axes, projection, scale)
    for axes in list(grid.flat)[len(shown) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("optimizer step")
    for axes in list(grid.flat)[max(0, len(shown) - columns) : len(shown)]:
        axes.set_xlabel("layer")
    mappable = ScalarMappable(scale, matplotlib.colormaps[COLOURS])
    figure.colorbar(mappable, ax=grid, label="distance (Frobenius norm)", aspect=40)
    alt = f"Dendrogram of each projection of {run.name}: {_told(projections)}."
    caption = (
        "Lines join where layers come to share one B: the height is the step, the colour the distance of their "
        "averaged B. Layers are ordered so that groups stand together."
    )
    return Drawing(f"dendrogram_{number + 1}", "Dendrograms of the merges", figure, alt, caption, number)


def _dendrogram(axes: Any, projection: Projection, scale: Normalize) -> None:
    order = projection.leaf_order()
    middle = {layer: float(place) for place, layer in enumerate(order)}
    height = dict.fromkeys(order, 0.0)
    colours = matplotlib.colormaps[COLOURS]
    for merge in projection.merges:
        left, right = sorted((merge.lower, merge.upper), key=lambda group: middle[group[0]])
        x, y = (middle[left[0]], middle[right[0]]), (height[left[0]], height[right[0]])
        xs, ys = [x[0], x[0], x[1], x[1]], [y[0], merge.step, merge.step, y[1]]
        axes.plot(xs, ys, color=colours(scale(merge.distance)), linewidth=1.8, solid_joinstyle="miter")
        for layer in (*left, *right):
            middle[layer], height[layer] = sum(x) / 2, float(merge.step)
    every = math.ceil(len(order) / _MOST_LABELS)
    axes.set_xticks(range(0, len(order), every), [str(layer) for layer in order[::every]], fontsize=6, rotation=90)
    axes.set_xlim(-0.7, len(order) - 0.3)
    from_zero(axes)
    axes.grid(axis="x", visible=False)
    axes.set_title(projection.title)
    axes.axhline(0, color=INK, linewidth=0.8)


def _values(run: Run, number: int) -> Drawing | None:
    steps, values = finite(run, "aslora/trainable_values")
    if not steps:
        return None
    figure, axes = new_figure(6.4, 3.0)
    thousands = [value / 1e3 for value in values]
    axes.step(steps, thousands, where="post", color=RUNS[number])
    steps_axis(axes)
    axes.set_ylabel("trained values (thousands)")
    from_zero(axes)
    alt = f"Step chart: {run.name} trains {values[0]:,.0f} values at first and {values[-1]:,.0f} at last."
    return Drawing(f"values_{number + 1}", "Trained values", figure, alt, "Each merge removes one B.", number)
