"""Which layers merge next: pure functions of the sharing map and the running averages, without state.

A sharing map is a list `rows`: layer l reads row `rows[l]` of the stacked B. Layers with equal entries form a group.
Groups are ordered by their lowest layer; of two groups the one with the lowest layer is the lower one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def planned_merges(num_layers: int, num_merges: int | None) -> int:
    """Merges to take in a group of `num_layers` layers; None means n - max(1, round(0.4 n)), the paper's 7 for 12."""
    if num_layers == 1:
        return 0
    return num_layers - max(1, round(0.4 * num_layers)) if num_merges is None else num_merges


def groups_of(rows: Sequence[int]) -> dict[int, list[int]]:
    """Row -> its layers, in the order of the groups' lowest layers."""
    groups: dict[int, list[int]] = {}
    for layer, row in enumerate(rows):
        groups.setdefault(row, []).append(layer)
    return groups


def is_sharing_map(rows: Sequence[int]) -> bool:
    """Whether every row that is read belongs to a layer that reads it: the form that all merges keep."""
    return all(0 <= row < len(rows) and rows[row] == row for row in rows)


def merged(rows: Sequence[int], lower: int, upper: int) -> list[int]:
    """The map after the layers of row `lower` have changed to row `upper`."""
    return [upper if row == lower else row for row in rows]


def records_fit(rows: Sequence[int], history: Sequence[Sequence[int]], clock: Sequence[int]) -> bool:
    """Whether a map, its history (step, lower and upper row of each merge, -1 if not taken) and its clock agree.

    The map of a combination of adapters, or one found from values, has no history; it is finished.
    """
    steps, samples, finished = clock
    if finished not in (0, 1) or steps < 0 or not 0 <= samples <= max(steps, 0):
        return False
    taken = [entry for entry in history if entry[0] >= 0]
    replayed = list(range(len(rows)))
    for _, lower, upper in taken:
        replayed = merged(replayed, lower, upper)
    return replayed == list(rows) or (not taken and finished == 1)


def common_refinement(maps: Sequence[Sequence[int]]) -> list[int]:
    """The coarsest map in which layers share only if they share in all `maps`; a group reads its highest layer."""
    keys = list(zip(*maps, strict=True))
    highest = {key: layer for layer, key in enumerate(keys)}
    return [highest[key] for key in keys]


def change_of_basis(A: Tensor) -> Tensor:
    """L [r, r] in float64 with ||X A||_F = ||X L||_F for every X: the distance `product` from r x r matrices alone."""
    gram = A.double() @ A.double().T
    eigenvalues, vectors = torch.linalg.eigh(gram)
    return vectors * eigenvalues.clamp_min(0).sqrt()


def change_of_bases(A: Tensor, r: int, experts: int) -> Tensor:
    """The same for B of several experts, r columns each: block-diagonal [experts * r, experts * r].

    Args:
        A: [experts * r, in_features], or [r, in_features] for all.
    """
    blocks = [change_of_basis(part) for part in A.split(r)]
    return torch.block_diag(*(blocks if len(blocks) == experts else blocks * experts))


def squared_distances(averages: Tensor, basis: Tensor | None = None) -> Tensor:
    """Squared Frobenius distances of k matrices (eq. 4), by differences and not by a Gram matrix: equal ones give 0.

    Args:
        averages: [k, out_features, r], the running averages of the live groups.
        basis: [r, r] from `change_of_basis` for the distance `product`; None for `factor`.

    Returns:
        [k, k] in float64, on the CPU.
    """
    flat = averages.double() if basis is None else averages.double() @ basis
    flat = flat.flatten(1)
    n = len(flat)
    squares = torch.zeros(n, n, dtype=torch.float64, device=flat.device)
    upper = torch.ones_like(squares, dtype=torch.bool).triu(1)
    squares[upper] = torch.pdist(flat).square()  # in one pass, without the differences in memory
    return (squares + squares.T).cpu()


def closest_pair(distances: Tensor, candidates: str) -> tuple[int, int] | None:
    """Positions (lower, upper) of the two closest groups; ties go to the lowest pair. None: no pair is known apart.

    Args:
        distances: [k, k], groups in order of their lowest layers, k >= 2; -1 between groups that say nothing yet.
        candidates: `all` pairs, or only groups that are neighbours in that order (`adjacent`).
    """
    allowed = torch.ones_like(distances, dtype=torch.bool).triu(1)
    if candidates == "adjacent":
        allowed &= ~torch.ones_like(allowed).triu(2)
    pairs = allowed.nonzero()  # in lexical order
    values = distances[allowed]
    known = ~(values < 0)
    if not bool(known.any()):
        return None
    # Values that overflowed are no reason to stop: nan counts as farthest.
    values = values.nan_to_num(nan=torch.inf, posinf=torch.inf)
    lower, upper = pairs[int(((values == values[known].min()) & known).nonzero()[0])].tolist()
    return lower, upper
