"""What a run says in text: metrics before and after, and merges."""

from typing import Any

from peft import PeftModel


def metrics_table(before: dict[str, float], after: dict[str, float]) -> str:
    """Held-out metrics before and after training."""
    rows = [("held out", "before", "after")]
    rows += [(name, f"{before[name]:.4g}", f"{after[name]:.4g}") for name in ("loss", "perplexity")]
    rows += [("token accuracy", f"{before['accuracy']:.1%}", f"{after['accuracy']:.1%}")]
    lines = [f"{name:<16}{left:>10}{right:>10}" for name, left, right in rows]
    return "\n".join([*lines, f"({before['tokens']:,} tokens)"])


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
