"""What a run says in text: metrics before and after, and merges."""

from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from transformers import TrainingArguments


def run_header(model: PeftModel, args: TrainingArguments, data: list[tuple[str, str]]) -> str:
    """What a run is about to do: on what, with which data, and which values it trains.

    Args:
        data: lines about the data, each with its name.
    """
    base: Any = model.get_base_model()
    first = next(p for p in base.parameters() if p.is_floating_point() or p.ndim)
    dtype = str(first.dtype).split(".")[-1]
    for name, flag in (("NF4", "is_loaded_in_4bit"), ("INT8", "is_loaded_in_8bit")):
        dtype = name if getattr(base, flag, False) else dtype
    lines = [("device", f"{args.device}, base weights in {dtype}"), *data]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.get_base_model().parameters())
    lines.append(("trained", f"{trained:,} values beside {total - trained:,} frozen ones"))
    if shares(model):
        lines += [("merges", line) for line in merge_plan(model)]
    return "\n".join(f"{name:<10}{text}" for name, text in lines)


def merge_plan(model: PeftModel) -> list[str]:
    """How many layers of each projection are to share one B in the end."""
    tuner: Any = model.base_model
    report = tuner.sharing_report().to_dict()
    plans: dict[str, list[str]] = {}
    for projection in report["projections"]:
        layers = sum(projection["group_sizes"])
        plan = f"{layers} layers, {projection['merges_planned']} merges planned"
        plans.setdefault(plan, []).append(projection["projection"].rpartition(".")[2])
    counts = report["trainable_values"]
    lines = [f"{', '.join(names)}: {plan}" for plan, names in plans.items()]
    return [*lines, f"{counts['start']:,} values at the start, {counts['end']:,} after the last planned merge"]


def metrics_table(before: dict[str, float], after: dict[str, float], titles: Mapping[str, str]) -> str:
    """Held-out metrics before and after training.

    Args:
        titles: metric -> what the table calls it; shares are those with accuracy or F1 in their title.
    """
    rows = [("held out", "before", "after")]
    rows += [(title, shown(title, before[name]), shown(title, after[name])) for name, title in titles.items()]
    lines = [f"{name:<16}{left:>10}{right:>10}" for name, left, right in rows]
    counted = [f"({before[name]:,} {name})" for name in ("tokens", "rows") if name in before]
    return "\n".join([*lines, *counted])


def shown(title: str, value: float) -> str:
    """A metric's value in a table."""
    return f"{value:.1%}" if "accuracy" in title or "F1" in title else f"{value:.4g}"


def shares(model: PeftModel) -> bool:
    """Whether the adapter's method merges layers during training (ASLoRA)."""
    return hasattr(model.base_model, "sharing_report")


def merges(model: PeftModel) -> list[dict[str, Any]]:
    """The merges so far, oldest first."""
    tuner: Any = model.base_model
    return tuner.sharing_report().to_dict()["merges"]


def merge_lines(found: list[dict[str, Any]]) -> list[str]:
    """One line for the merges of a projection: layers that now take the B of others."""
    lines = []
    for projection in dict.fromkeys(merge["projection"] for merge in found):
        events = [merge for merge in found if merge["projection"] == projection]
        pairs = ", ".join(f"{_listed(merge['lower'])} -> {_listed(merge['upper'])}" for merge in events)
        distance = max(merge["distance"] for merge in events)
        lines.append(f"step {events[-1]['step']}: {projection} merges layers {pairs} (distance up to {distance:.3g})")
    return lines


def _listed(layers: list[int]) -> str:
    if len(layers) > 3:
        return f"{layers[0]}+..+{layers[-1]} ({len(layers)} layers)"
    return "+".join(map(str, layers))
