"""How MEFT's layers were used, from the lines of a run's record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerUse:
    """What came in one layer between two records.

    Attributes:
        step: of the later record.
        union_share: mean |U| / r of the passes.
        expert_load: picks of each expert.
        top: picks of the shares of neurons that `training.run_record.TOP_SHARES` names, the most picked ones first.
    """

    step: int
    layer: str
    union_share: float
    expert_load: list[int]
    top: list[int]

    @property
    def busiest(self) -> float:
        """The busiest expert's load beside an even load; nan without picks."""
        picks = sum(self.expert_load)
        return max(self.expert_load) * len(self.expert_load) / picks if picks else float("nan")


def layer_use_of(lines: list[dict[str, Any]]) -> list[LayerUse]:
    """All records of layers; what is damaged in them is left out."""
    found = []
    for line in lines:
        layers = line.get("layers") if line.get("kind") == "layers" else None
        if not isinstance(layers, dict):
            continue
        for path, entry in layers.items():
            try:
                load, top = ([int(n) for n in entry[name]] for name in ("expert_load", "picks_of_top_rows"))
                use = LayerUse(line["step"], str(path), float(entry["union_share"]), load, top)
            except (KeyError, TypeError, ValueError):
                continue
            if load and top and min(*load, *top) >= 0:
                found.append(use)
    return found
