"""The table and the plot of the 24 GB benchmark; what was not measured says so in its cell."""

import io
import math
from pathlib import Path

from benchmarks.card_24gb.plan import HOST_STRATEGIES, Cell, Group
from benchmarks.card_24gb.report.rows import Rows
from benchmarks.card_24gb.report.targets import CARD_GIB, MEASURED, is_main, reported, targets, traffic_error
from benchmarks.card_24gb.worker import DRY
from peft_bridge import replace_file

UNMEASURED = "not measured"
HEAD = (
    "contestant", "routing", "fits", "tokens/s", "of null", "step ms (0.2, 0.5, 0.8)", "bound ms", "stall ms",
    "torch peak GiB", "device GiB", "host GiB", "to device", "to host", "formula", "\\|U\\|/r",
)  # fmt: skip
NOTES = (
    "`null`: the same engine with bf16 rows on the device and no host optimizer, 100 %. tokens/s is of the median",
    "step; a step ends when the device is idle, and host updates that run on are in the next one's time. To device,",
    "to host: bytes a step / elements of two bytes. Bound: `meft.cost.step_time` with the ceilings of the same worker.",
    "Formula: counters beside the formula of `card_24gb/traffic.py`,",
    "the worse way. \\|U\\|/r is forced, or drawn from a recording (`card_24gb/routing.py`); random weights route",
    "nothing here. Ratios compare rows of one invocation only. Device GiB is what the whole device has in use; a peer",
    f"above {CARD_GIB:g} is outside of a 24 GB card, and not compared with.",
)


def cell_text(row: dict | None, *names: str, form: str = ".2f", scale: float = 1.0) -> str:
    """Fields of a row, or that they were not measured."""
    values = [row.get(name) if row else None for name in names]
    if any(value is None or (isinstance(value, float) and math.isnan(value)) for value in values):
        return UNMEASURED
    return ", ".join(format(scale * value, form) for value in values)  # type: ignore[operator]


def moved(row: dict | None, way: str) -> str:
    """Bytes and elements of one way."""
    if row is None or row.get(f"bytes_to_{way}") is None:
        return "-" if row and row["contestant"] not in (*HOST_STRATEGIES, "null") else UNMEASURED
    return f"{row[f'bytes_to_{way}'] / 1e6:.4g} MB / {row[f'elements_to_{way}'] / 1e6:.4g} M"


def formula(row: dict | None) -> str:
    """How far the counters are from it."""
    error = traffic_error(row) if row else None
    return UNMEASURED if error is None else f"{100 * error:.2f} %"


def fits(row: dict | None) -> str:
    """Whether it fits, or what kept it from being measured."""
    if row is None:
        return UNMEASURED
    if row["status"] == MEASURED:
        return "yes" if row["device_gib"] <= CARD_GIB else f"above {CARD_GIB:g} GiB in all"
    return UNMEASURED if row["status"] == DRY else row["status"].replace("|", "/")


def line(cell: Cell, row: dict | None) -> str:
    """A line of the table."""
    fields = [
        cell.contestant + (f" ({row['strategy']})" if row and cell.contestant == "meft auto" else ""), cell.routing,
        fits(row), cell_text(row, "tokens_per_s", form=".0f"), cell_text(row, "of_null", form=".0f", scale=100),
        cell_text(row, "ms_q20", "ms_q50", "ms_q80", form=".0f"),
        cell_text(row, "bound_ms", form=".0f"), cell_text(row, "stall_ms", form=".1f"),
        cell_text(row, "peak_gib"), cell_text(row, "device_gib"),
        cell_text(row, "host_gib"), moved(row, "device"), moved(row, "host"), formula(row),
        cell_text(row, "union_share", form=".3f"),
    ]  # fmt: skip
    return f"| {' | '.join(fields)} |"


def markdown(rows: Rows, groups: list[Group], dry: bool) -> str:
    """The table of each group, and the targets."""
    text = ["# A 7B model on one 24 GB card", ""]
    if dry:
        text += ["DRY RUN on tiny shapes on the CPU: times and memory mean nothing and are left out.", ""]
    text += [*NOTES, "", "## Targets", ""]
    text += [f"- {said}" for said in verdicts(rows, dry)]
    for group in groups:
        first = group.cells[0]
        clip = "clipping" if first.clip else "no clipping"
        text += [
            "",
            f"## {first.model}, {first.base}, {first.batch}x{first.length}, accumulation {first.accumulation}, {clip}, "
            f"r {first.r}",
            "",
            f"| {' | '.join(HEAD)} |",
            f"|{'---|' * len(HEAD)}",
            *(line(cell, rows.find(cell)) for cell in group.cells),
        ]
    notes = {row["contestant"]: row["note"] for row in rows.rows if row.get("note")}
    text += ["", *(f"- {name}: {note}" for name, note in notes.items()), "", "Environments:", ""]
    text += [f"{i}. {held}" for i, held in enumerate(rows.held["environments"])]
    return "\n".join(text) + "\n"


def verdicts(rows: Rows, dry: bool) -> list[str]:
    """The targets as text; a dry run has met none."""
    held = [] if dry else rows.rows
    return [target.line() for target in targets(held)] + reported(held)


def plot(rows: Rows, dry: bool) -> bytes | None:
    """Speed over |U|/r, and peaks, at the main shape; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    main = [] if dry else [row for row in rows.rows if row["status"] == MEASURED and is_main(row, r=row["r"])]
    main = [row for row in main if row["r"] == 6400 or row["routing"] == "-"]
    for name in (*HOST_STRATEGIES, "null"):
        mine = sorted((row["union_share"], row["tokens_per_s"]) for row in main if row["contestant"] == name)
        if mine:
            left.plot(*zip(*mine, strict=True), marker="o", label=name)
    for i, row in enumerate(row for row in main if row["routing"] == "-"):
        label = f"{row['contestant']} r {row['r']}"
        left.axhline(row["tokens_per_s"], linestyle="--", color=f"C{(i + 6) % 10}", linewidth=1, label=label)
    left.set(xlabel="|U| / r", ylabel="tokens/s (median step)", title="r 6400, bf16 base, 2x256, accumulation 1")
    bars = {f"{row['contestant']} r {row['r']}": row["peak_gib"] for row in main if row["routing"] in ("-", "0.26")}
    right.barh(list(bars), list(bars.values()))
    right.set(xlabel="peak of torch's allocator, GiB", title="|U| = 0.26 r")
    if main:
        left.legend(fontsize=7)
    for axes in (left, right) if not main else ():
        axes.text(0.5, 0.5, "DRY RUN: not measured" if dry else UNMEASURED, ha="center", transform=axes.transAxes)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    pyplot.close(figure)
    return image.getvalue()


def write(path: Path, rows: Rows, groups: list[Group], dry: bool) -> None:
    """The table and the plot beside the rows."""
    replace_file(path.with_suffix(".md"), markdown(rows, groups, dry).encode())
    image = plot(rows, dry)
    if image is None:
        print("No plot: matplotlib is not installed.")
    else:
        replace_file(path.with_suffix(".png"), image)
