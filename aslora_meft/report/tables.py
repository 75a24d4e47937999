"""The tables of a page: numbers at a glance, metrics, hyperparameters, versions; one column of values a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import peft

from aslora_meft.report.curves import finite
from aslora_meft.report.run_folder import Run, numbers

_ORIGIN = {field.name for field in dataclasses.fields(peft.PeftConfig)}  # about model and version, no hyperparameter
_NOT_SET: tuple[Any, ...] = (None, False, [], {}, "")


class Table(NamedTuple):
    """A table of a page.

    Attributes:
        columns: of the values.
        rows: name, and a value a column; an empty one where there is none.
    """

    title: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]


def tables(runs: Sequence[Run]) -> list[Table]:
    """The tables that have rows."""
    names = [run.name for run in runs]
    results = [_metrics(run) for run in runs]
    columns = [f"{name}, {when}" if len(runs) > 1 else when for name in names for when in ("before", "after")]
    metrics = {row for found in results for row in found}
    order = [row for row in ("loss", "perplexity", "accuracy", "exact_match", "tokens") if row in metrics]
    rows = [
        (row.replace("_", " "), [value for found in results for value in found.get(row, ["", ""])])
        for row in [*order, *sorted(metrics - set(order))]
    ]
    parts = [
        Table("Held-out metrics", columns, rows),
        _table("Run", runs, _facts),
        _table("Hyperparameters of the adapter", runs, _adapter),
        _table("Training", runs, lambda run: {k: text(v) for k, v in run.training.items() if v not in _NOT_SET}),
        _table("Data", runs, _data),
        _table("Method, at the end", runs, _method),
        _table("Versions", runs, lambda run: {k: text(v) for k, v in run.versions.items()}),
    ]
    return [table for table in parts if table.rows]


def text(value: Any) -> str:
    """A value as a reader wants it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        found = ", ".join(sorted(map(str, value))) if isinstance(value, list | tuple | set) else str(value)
        return found if len(found) <= 300 else f"{found[:300]} ..."
    if isinstance(value, float) and not (value.is_integer() and abs(value) < 1e15):
        return f"{value:.4g}"
    return f"{int(value):,}" if abs(value) >= 10_000 else f"{int(value)}"


def _table(title: str, runs: Sequence[Run], values_of: Callable[[Run], dict[str, str]]) -> Table:
    found = [values_of(run) for run in runs]
    names = list(dict.fromkeys(name for values in found for name in values))
    columns = [run.name for run in runs] if len(runs) > 1 else ["value"]
    return Table(title, columns, [(name, [values.get(name, "") for values in found]) for name in names])


def _metrics(run: Run) -> dict[str, list[str]]:
    before, after = (numbers(run.results.get(when)) for when in ("before", "after"))
    return {
        name: [text(found[name]) if name in found else "" for found in (before, after)] for name in {**before, **after}
    }


def _facts(run: Run) -> dict[str, str]:
    values = numbers(run.values)
    losses, rates = finite(run, "loss")[1], finite(run, "tokens_per_second")[1]
    held_out = finite(run, "eval_loss")[1]
    facts = {
        "status": run.status,
        "method": run.method,
        "base model": run.model,
        "device": run.device,
        "trained values": text(values["trained"]) if "trained" in values else "",
        "frozen values": text(values["frozen"]) if "frozen" in values else "",
        "last training loss": text(losses[-1]) if losses else "",
        "last held-out loss": text(held_out[-1]) if held_out else "",
        "tokens per second, median": f"{sorted(rates)[len(rates) // 2]:,.0f}" if rates else "",
    }
    for name, what in (("memory/host_gib", "host memory"), ("memory/device_gib", "device memory")):
        if values_of := finite(run, name)[1]:
            facts[f"{what}, at most"] = f"{max(values_of):.2f} GiB"
    return {name: value for name, value in facts.items() if value}


def _adapter(run: Run) -> dict[str, str]:
    left_out = {*_ORIGIN, "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type"}
    return {k: text(v) for k, v in sorted(run.adapter.items()) if k not in left_out and v not in _NOT_SET}


def _data(run: Run) -> dict[str, str]:
    data = run.results.get("data")
    return {str(name): text(value) for name, value in data.items()} if isinstance(data, dict) else {}


def _method(run: Run) -> dict[str, str]:
    """What the method's own report says after the run."""
    transfers, sharing = run.results.get("transfers"), run.results.get("sharing")
    found: dict[str, str] = {}
    if isinstance(transfers, dict):
        names = {
            "strategy": "retrieval strategy",
            "union_share": "|U| / r, mean",
            "busiest_expert_share": "busiest expert / even load, mean",
            "idle_expert_share": "share of experts without a pick",
            "top_rows_share": "share of picks of the most picked tenth",
            "stall_ms": "waited for copies and updates (ms)",
        }
        found |= {title: text(transfers[name]) for name, title in names.items() if transfers.get(name) is not None}
        for name, title in (("bytes_to_device", "host to device"), ("bytes_to_host", "device to host")):
            if name in numbers(transfers):
                found[title] = f"{transfers[name] / 2**20:,.1f} MiB"
        if "strategy" in transfers and transfers["strategy"] is None:
            found = {"rows": "read where they are: nothing crosses", **found}
    if run.projections:
        merges = sum(len(projection.merges) for projection in run.projections)
        found["merges"] = f"{merges} in {len(run.projections)} projections"
    if isinstance(sharing, dict):
        counts = numbers(sharing.get("trainable_values"))
        titles = {"start": "values at the start", "now": "values at the end"}
        found |= {title: text(counts[name]) for name, title in titles.items() if name in counts}
        warnings = sharing.get("warnings")
        for i, warning in enumerate(warnings if isinstance(warnings, list) else [], 1):
            found[f"warning {i}"] = text(warning)
    return found
