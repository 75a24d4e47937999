"""Which layers ASLoRA has merged, when and at what distance: from a run's record, its results, or an adapter's file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from aslora.files.merge_history import merge_history


@dataclass(frozen=True)
class Merge:
    """Two groups of layers that came to share one B.

    Attributes:
        distance: of the averages of B, a Frobenius norm.
    """

    step: int
    lower: tuple[int, ...]
    upper: tuple[int, ...]
    distance: float


@dataclass(frozen=True)
class Projection:
    """The layers of one projection and their merges in order.

    Attributes:
        name: the module path with `*` for the layer.
        layers: ascending.
    """

    name: str
    layers: list[int]
    merges: list[Merge]

    @property
    def title(self) -> str:
        """The part of the name that tells projections apart."""
        return self.name.rpartition("*.")[2]

    def joined(self) -> dict[int, Merge]:
        """Layer -> the merge by which it first came to share its B."""
        first: dict[int, Merge] = {}
        for merge in self.merges:
            for layer in (*merge.lower, *merge.upper):
                first.setdefault(layer, merge)
        return first

    def leaf_order(self) -> list[int]:
        """The layers such that each group stands together, and the lines of a dendrogram do not cross."""
        groups = {layer: [layer] for layer in self.layers}
        for merge in self.merges:
            one, other = groups[merge.lower[0]], groups[merge.upper[0]]
            together = one + other if min(one) < min(other) else other + one
            groups |= dict.fromkeys(together, together)
        shown: list[int] = []
        for layer in self.layers:
            if layer not in shown:
                shown += groups[layer]
        return shown


def projections_of(
    lines: list[dict[str, Any]], results: dict[str, Any], saved: Path | None
) -> tuple[list[Projection], str | None]:
    """The projections of a run.

    Args:
        lines: of the run's record. results: of `results.json`. saved: a folder with the adapter's file.

    Returns:
        the projections, and a sentence where what is in the files cannot be read or contradicts itself.
    """
    note = None
    recorded = _recorded(lines)
    sharing = results.get("sharing")
    candidates = (
        [(_list(sharing.get("projections")), _list(sharing.get("merges")))] if isinstance(sharing, dict) else []
    )
    if saved is not None:
        try:
            candidates.append(merge_history(saved))
        except (SafetensorError, OSError, KeyError, IndexError, ValueError, TypeError) as error:
            note = f"The adapter's file cannot be read, so it says nothing of its merges ({error})."
    begun = [_list(line.get("projections")) for line in lines if line.get("kind") == "begin"]
    if begun and begun[-1]:
        candidates.append((begun[-1], []))
    for projections, merges in candidates:
        # A checkpoint is older than the last line of the record.
        newest = max(merges, recorded, key=len)
        try:
            found = [_projection(entry, newest) for entry in projections]
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            note = note or "The merges in the run's files contradict each other and were left out."
            continue
        if found:
            return found, note
    return [], note or "The sharing of layers is in none of the files."


def _recorded(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A resumed run repeats the merges that its checkpoint brought along."""
    merges = [merge for line in lines if line.get("kind") == "merges" for merge in _list(line.get("merges"))]
    whole = [m for m in merges if isinstance(m, dict) and isinstance(m.get("step"), int)]
    unlike = {tuple(str(m.get(name)) for name in ("step", "projection", "lower", "upper")): m for m in whole}
    return sorted(unlike.values(), key=lambda merge: merge["step"])


def _projection(entry: dict[str, Any], merges: list[dict[str, Any]]) -> Projection:
    name, layers = entry["projection"], sorted({int(layer) for group in entry["groups"] for layer in group})
    own = [
        Merge(int(m["step"]), tuple(m["lower"]), tuple(m["upper"]), float(m["distance"]))
        for m in merges
        if m["projection"] == name
    ]
    groups = {layer: frozenset([layer]) for layer in layers}
    for merge in own:
        lower, upper = frozenset(merge.lower), frozenset(merge.upper)
        if groups[merge.lower[0]] != lower or groups[merge.upper[0]] != upper or lower & upper:
            raise ValueError("merges of groups that there are not")
        if not math.isfinite(merge.distance):
            raise ValueError("a distance that is no number")
        groups |= dict.fromkeys(lower | upper, lower | upper)
    return Projection(str(name), layers, own)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
