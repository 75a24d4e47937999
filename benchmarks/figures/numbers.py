"""The numbers that the figures show, from the rows of the benchmarks; nothing here draws."""

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.aslora_classify.runs import read_settings as classify_settings
from benchmarks.common.comparisons import read_list
from benchmarks.common.paired_test import paired_t
from benchmarks.common.places import RESULTS
from benchmarks.common.protocol import REPORTED, TUNING
from benchmarks.common.runs import of_settings
from benchmarks.meft_forgetting.runs import read_settings

Numbers = dict[str, Any]  # JSON

FOLDER = Path(__file__).resolve().parents[1]
ASLORA_SETTINGS = FOLDER / "aslora_classify" / "option.json"
MEFT_SETTINGS = FOLDER / "meft_forgetting" / "settings.json"
RIVAL = "LoRA r 8"


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


def aslora(results: Path = RESULTS, settings: Path = ASLORA_SETTINGS) -> Numbers | None:
    """What each method gains over LoRA r 8, paired by seed, as a share of its loss and in points of accuracy, with the
    share of its values that the method keeps; on each task where both have all seeds. None where no method has.
    """
    planned = classify_settings(settings)
    rows = of_settings({"rows": _rows(results / f"aslora_classify_{settings.stem}.json")}, planned, "cpu")["rows"]
    seeds, margins = planned.protocol.seeds, read_list(planned.comparisons).margins

    def reported(task: str, method: str) -> list[dict] | None:
        wanted = (task, method, REPORTED)
        found = {row["seed"]: row for row in rows if (row["task"], row["method"], row["split"]) == wanted}
        return [found[seed] for seed in seeds] if set(seeds) <= found.keys() else None

    tasks = []
    for task in planned.tasks:
        rivals, points = reported(task.name, RIVAL), []
        for method in planned.methods:
            ours = reported(task.name, method.name)
            if rivals is None or ours is None or method.name == RIVAL:
                continue
            pairs, mean_loss = list(zip(ours, rivals, strict=True)), mean(row["loss"] for row in rivals)
            share = 100 * ours[0]["values_end"] / rivals[0]["values_end"]
            point: Numbers = {"label": method.name, "values": rounded(share)}
            point["loss"] = over_seeds(100 * (rival["loss"] - own["loss"]) / mean_loss for own, rival in pairs)
            point["accuracy"] = over_seeds(100 * (own["accuracy"] - rival["accuracy"]) for own, rival in pairs)
            points.append(point)
        tasks.append({"task": task.name, "points": points})
    shared = {"seeds": len(seeds), "rival": RIVAL, "margins": {"loss": 100 * margins["loss"]["relative"]}}
    shared["margins"]["accuracy"] = 100 * margins["accuracy"]["absolute"]
    return shared | {"tasks": tasks} if any(task["points"] for task in tasks) else None


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
