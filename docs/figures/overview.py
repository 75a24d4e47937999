"""The figure of the README, drawn from committed results.

    python docs/figures/overview.py           # writes overview.svg beside this file
    python docs/figures/overview.py --check   # exit code 1 where overview.svg is not what the results give

Left and middle: `benchmarks/results/aslora_quality.json`. Right: `benchmarks/results/meft_cpu.json`. With the pinned
matplotlib the file is the same, byte for byte, on every run.
"""

from __future__ import annotations

import io
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FIGURE = Path(__file__).with_suffix(".svg")

# Label -> the method's name in the result file; ASLoRA at the top.
METHODS = {
    "ASLoRA r 8": "ASLoRA r 8",
    "LoRA r 2": "LoRA r 2 (nearest to ASLoRA r 8 at its end)",
    "VeRA r 256": "VeRA r 256",
    "ASLoRA r 32": "ASLoRA r 32",
    "LoRA r 8": "LoRA r 8",
}
OURS, OTHER = "#1f6f8b", "#a9b4bd"
STYLE = {"svg.hashsalt": "overview", "svg.fonttype": "path", "font.size": 9, "axes.titlesize": 9.5}


def quality() -> dict[str, tuple[float, list[float]]]:
    """Label -> size of the saved file in MB, exact match of each seed in per cent."""
    rows = json.loads((RESULTS / "aslora_quality.json").read_text())["rows"]
    found = {}
    for label, name in METHODS.items():
        tests = [row for row in rows if (row["task"], row["method"], row["split"]) == ("banking77", name, "test")]
        found[label] = (tests[0]["file_bytes"] / 1e6, [100 * row["exact_match"] for row in tests])
    return found


def speed() -> list[dict[str, Any]]:
    """The rows of r 6400 with Zipf inputs, by tokens."""
    rows = json.loads((RESULTS / "meft_cpu.json").read_text())["rows"]
    return sorted((r for r in rows if (r["input"], r["r"]) == ("zipf", 6400)), key=lambda row: row["tokens"])


def draw() -> bytes:
    """The figure as SVG."""
    with plt.rc_context(STYLE):
        figure, (sizes, matches, times) = plt.subplots(
            1, 3, figsize=(10, 2.9), width_ratios=[1, 1, 1.25], layout="constrained"
        )
        labels, measured = list(METHODS), quality()
        colours = [OURS if label.startswith("ASLoRA") else OTHER for label in labels]
        sizes.barh(labels, [measured[label][0] for label in labels], color=colours)
        for place, label in enumerate(labels):
            sizes.text(measured[label][0] + 0.2, place, f"{measured[label][0]:.1f}", va="center")
        sizes.set(title="Saved adapter, MB", xlim=(0, 11.5))
        for place, (label, colour) in enumerate(zip(labels, colours, strict=True)):
            seeds = measured[label][1]
            matches.plot(seeds, [place] * len(seeds), "o", color=colour, markersize=5)
            matches.plot([statistics.mean(seeds)], [place], "|", color="black", markersize=13)
        matches.set(title="banking77, exact match %:\nthree seeds and their mean", xlim=(65, 90))
        matches.set_yticks(range(len(labels)), [])
        for axes in (sizes, matches):
            axes.set_ylim(len(labels) - 0.5, -0.5)

        rows = speed()
        values = [row["times as fast"] for row in rows]
        spread = [
            [value - row["lowest and highest round"][0] for value, row in zip(values, rows, strict=True)],
            [row["lowest and highest round"][1] - value for value, row in zip(values, rows, strict=True)],
        ]
        times.bar([str(row["tokens"]) for row in rows], values, color=OURS, yerr=spread, capsize=2, ecolor="#555555")
        times.axhline(1, color="black", linewidth=0.8, linestyle="--")
        times.set(title="MEFT r 6400, one layer on a CPU:\ntimes as fast as a dense adapter", xlabel="tokens a step")
        for axes in (sizes, matches, times):
            axes.spines[["top", "right"]].set_visible(False)
        target = io.BytesIO()
        figure.savefig(target, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    # Trailing blanks would be stripped by editors.
    return b"\n".join(line.rstrip() for line in target.getvalue().splitlines()) + b"\n"


def main(arguments: list[str]) -> int:
    drawn = draw()
    if arguments == ["--check"]:
        return int(not FIGURE.exists() or FIGURE.read_bytes() != drawn)
    FIGURE.write_bytes(drawn)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
