"""The numbers that the figures show, from the rows of the benchmarks; nothing here draws."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.aslora_quality.__main__ import SEEDS
from benchmarks.common.paired_test import paired_t
from benchmarks.common.places import RESULTS
from benchmarks.common.protocol import REPORTED, TUNING
from benchmarks.common.runs import of_settings
from benchmarks.meft_forgetting.runs import read_settings

Numbers = dict[str, Any]  # JSON

# Label -> the method's name in the rows.
ASLORA = {
    "VeRA r 256": "VeRA r 256",
    "ASLoRA r 8": "ASLoRA r 8",
    "LoRA r 2": "LoRA r 2 (nearest to ASLoRA r 8 at its end)",
    "ASLoRA r 32": "ASLoRA r 32",
    "LoRA r 8": "LoRA r 8",
}
PANELS = (("banking77", "exact_match", 100.0), ("gsm8k", "loss", 1.0))  # task, metric, factor
MEFT_SETTINGS = Path(__file__).resolve().parents[1] / "meft_forgetting" / "settings.json"


def over_seeds(values: Iterable[float]) -> Numbers:
    """Mean of some seeds, with its 95 % t interval where there are two or more."""
    found = list(values)
    if len(found) < 2:
        return {"n": len(found), "mean": rounded(found[0]), "interval": None}
    test = paired_t(found)
    return {"n": len(found), "mean": rounded(test.mean), "interval": [rounded(test.low), rounded(test.high)]}


def rounded(value: float) -> float:
    """To what a figure can show."""
    return float(f"{value:.4g}")


def aslora(results: Path = RESULTS) -> Numbers | None:
    """Quality against the number of values at the end of training; None without rows."""
    rows = _rows(results / "aslora_quality.json")
    panels = []
    for task, metric, factor in PANELS:
        points = []
        for label, name in ASLORA.items():
            wanted = (task, name, REPORTED)
            found = [row for row in rows if (row["task"], row["method"], row["split"]) == wanted]
            if found:
                values = [factor * row[metric] for row in found]
                points.append({"label": label, "values": found[0]["parameters_end"]} | over_seeds(values))
        panels.append({"task": task, "metric": metric, "points": points})
    return {"planned": len(SEEDS), "panels": panels} if rows else None


def meft(results: Path = RESULTS, settings: Path = MEFT_SETTINGS) -> Numbers | None:
    """Recall and forgetting: at each tuning rate, and of the reported seeds; None without rows.

    A run whose loss was no number has no point.
    """
    planned = read_settings(settings)
    of_task = of_settings({"rows": _rows(results / "meft_forgetting.json")}, planned, "cpu")["rows"]
    methods = []
    for method in planned.methods:
        rows = [row for row in of_task if row["method"] == method.name and row["forgetting"] is not None]
        tuned = sorted((row for row in rows if row["split"] == TUNING), key=lambda row: row["learning_rate"])
        reported = [row for row in rows if row["split"] == REPORTED and row["seed"] in planned.protocol.seeds]
        if not tuned and not reported:
            continue
        one: Numbers = {"label": method.name}
        one["frontier"] = [[rounded(100 * row["recall"]), rounded(row["forgetting"])] for row in tuned]
        if reported:
            one["recall"] = over_seeds(100 * row["recall"] for row in reported)
            one["forgetting"] = over_seeds(row["forgetting"] for row in reported)
        methods.append(one)
    seeds = len(planned.protocol.seeds)
    shared = {"planned": seeds, "facts": planned.setup.n_pairs, "least_recall": planned.setup.least_recall}
    return shared | {"methods": methods} if methods else None


def _rows(path: Path) -> list[dict]:
    return json.loads(path.read_text())["rows"] if path.exists() else []
