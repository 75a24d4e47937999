"""The sharing report: which layers share what, every merge, and the counts of values and bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from .layer_groups import module_path
from .sharing.merge_math import groups_of, merged
from .sharing.merge_unit import MergeUnit

EARLY_STEPS = 20  # after the warm-up: averages of fewer steps say little


@dataclass(frozen=True)
class SharingReport:
    """State of the sharing of one adapter; `str()` is a table, `to_dict()` is JSON-ready.

    Attributes:
        adapter: the adapter's name.
        projections: for each B-group its name, its `groups` (lists of layer indices that share one B), their
            `group_sizes`, the merges taken and planned, and the step up to which it has been followed.
        merges: each merge in order: `step`, `projection`, `lower` and `upper` (layer indices), `distance` (a Frobenius
            norm; with merge_scope="joint" over all projections that merge together).
        trainable_values: `start` (before any merge), `now`, and `end` (after the last planned merge).
        bytes: `allocated` (parameters and buffers), `live` (A, and each B once), `saved` (the file's tensors if saved
            now).
        warnings: what in the merges taken is likely to cost quality: merges within the first 20 steps after the
            warm-up, whose distances are of few steps, and merges of one projection that share a step.
    """

    adapter: str
    projections: list[dict[str, Any]]
    merges: list[dict[str, Any]]
    trainable_values: dict[str, int]
    bytes: dict[str, int]
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, numbers and strings."""
        return asdict(self)

    def __str__(self) -> str:
        width = max(len(p["projection"]) for p in self.projections)
        lines = [f"Sharing of adapter '{self.adapter}'", f"{'projection':<{width}}  merges  sizes and groups of layers"]
        for p in self.projections:
            groups = " ".join("{" + ",".join(map(str, g)) + "}" if len(g) > 1 else str(g[0]) for g in p["groups"])
            sizes = "+".join(map(str, p["group_sizes"]))
            lines.append(
                f"{p['projection']:<{width}}  {p['merges_taken']:>2}/{p['merges_planned']:<2}   {sizes} = {groups}"
            )
        counts, size = self.trainable_values, self.bytes
        lines.append(
            f"values: {counts['start']:,} at start, {counts['now']:,} now ({counts['now'] / counts['start']:.1%}), "
            f"{counts['end']:,} after the last planned merge"
        )
        lines.append(f"bytes: {size['allocated']:,} allocated, {size['live']:,} live, {size['saved']:,} in a file now")
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def report(adapter: str, units: list[MergeUnit], warmup_steps: int = 0) -> SharingReport:
    """Describe an adapter from the units of its B-groups, in a run whose learning rate rose for `warmup_steps`."""
    projections: list[dict[str, Any]] = []
    merges: list[dict[str, Any]] = []
    a_modules = list(dict.fromkeys(A for unit in units for _, A in unit.members.values()))
    a_values = sum(a.shared_A.numel() for a in a_modules)
    a_bytes = sum(a.shared_A.numel() * a.shared_A.element_size() for a in a_modules)
    start = end = a_values
    allocated = live = saved = a_bytes
    now = a_values
    for unit in units:
        for name, (B, _) in unit.members.items():
            layers, rows = B.layer_indices, B.sharing_map
            groups = [[layers[i] for i in group] for group in groups_of(rows).values()]
            projection = module_path(name, "*")
            projections.append(
                {
                    "projection": projection,
                    "groups": groups,
                    "group_sizes": [len(group) for group in groups],
                    "merges_taken": len(layers) - len(groups),
                    "merges_planned": unit.planned if unit.pending else len(layers) - len(groups),
                    "step": B.step,
                }
            )
            merges += replay(layers, B.merges(), projection)
            per_row = B.stacked_B.shape[1:].numel()  # indexing would gather what FSDP2 has sharded
            start += len(layers) * per_row
            now += len(groups) * per_row
            end += (len(layers) - unit.planned if unit.pending else len(groups)) * per_row
            size = per_row * B.stacked_B.element_size()
            if B.diagonal is not None:
                own, own_bytes = B.diagonal.numel(), B.diagonal.numel() * B.diagonal.element_size()
                start, now, end = start + own, now + own, end + own
                allocated, live, saved = allocated + own_bytes, live + own_bytes, saved + own_bytes
            buffers = {n: b.numel() * b.element_size() for n, b in B.named_buffers()}
            allocated += len(layers) * size + sum(buffers.values())
            live += len(groups) * size
            saved += len(groups) * size + sum(v for n, v in buffers.items() if n != "average")
            if unit.pending:
                saved += len(groups) * B.average[0].numel() * B.average.element_size()
    merges.sort(key=lambda merge: merge["step"])  # stable: at one step in the order of the projections
    return SharingReport(
        adapter,
        projections,
        merges,
        {"start": start, "now": now, "end": end},
        {"allocated": allocated, "live": live, "saved": saved},
        _warnings(merges, warmup_steps),
    )


def _warnings(merges: list[dict[str, Any]], warmup_steps: int) -> list[str]:
    """What in these merges is likely to cost quality."""
    warnings = []
    early = [merge["step"] for merge in merges if merge["step"] <= warmup_steps + EARLY_STEPS]
    if early:
        warnings.append(
            f"{len(early)} of {len(merges)} merges came within {EARLY_STEPS} steps after the warm-up of {warmup_steps} "
            f"(the first: {early[0]}), from distances of few steps: train longer or set a later merge_start"
        )
    times = Counter((merge["projection"], merge["step"]) for merge in merges)
    crowded = sorted({step for (_, step), count in times.items() if count > 1})
    if crowded:
        warnings.append(
            f"several merges of one projection came after the same step ({', '.join(map(str, crowded))}), with nothing "
            "learnt between them: train longer, or set fewer num_merges or a longer merge_interval"
        )
    return warnings


def replay(layers: list[int], records: list[tuple[int, int, int, float]], projection: str) -> list[dict[str, Any]]:
    """The recorded merges of a projection, such that each names the layers that it joined.

    Args:
        layers: the layer index of each row.
        records: step, lower row, upper row and distance of each merge, in order.
    """
    rows, entries = list(range(len(layers))), []
    for step, lower, upper, distance in records:
        entries.append(
            {
                "step": step,
                "projection": projection,
                "lower": [layers[i] for i, row in enumerate(rows) if row == lower],
                "upper": [layers[i] for i, row in enumerate(rows) if row == upper],
                "distance": distance,
            }
        )
        rows = merged(rows, lower, upper)
    return entries
