"""A recorded trace, replayed through the choice of rows with the bytes of `retrieval="stream"`."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from meft.tier.residency import Residency

COMPUTE, GRADIENT, STATE, COUNT, ID = 2, 2, 4 + 4 + 4, 4, 4  # bytes: of values; of a row's count; of an index


def trace_of(path: Path) -> Tensor:
    """Which rows each step used, bool [layers, steps, r]."""
    file = np.load(path)
    return torch.from_numpy(np.unpackbits(file["used"], axis=-1)[..., : int(file["r"])].astype(bool))


@dataclass
class Counts:
    """Of the second half of a trace, all layers.

    Attributes:
        used: rows of unions. found: those of them that had a place. entered, left: rows that changed their places.
        cold_keys: keys that were sent whole. crossed, without: bytes of rows with the tier, and without it.
    """

    used: int = 0
    found: int = 0
    entered: int = 0
    left: int = 0
    cold_keys: int = 0
    crossed: int = 0
    without: int = 0

    def shares(self) -> dict[str, float]:
        """What is to be reached: rows that the host updates, bytes that cross, rows that get a place."""
        return {
            "host-updated rows": 1 - self.found / self.used,
            "row bytes": self.crossed / self.without,
            "swaps": self.entered / self.used,
        }


def replay(used: Tensor, share: float, d: int) -> Counts:
    """The tier with places for a share of all rows, of d values each."""
    layers, steps, r = used.shape
    places, residency, counts = int(share * layers * r), Residency(layers, r), Counts()
    resident, allowed = torch.zeros(layers * r, dtype=torch.bool), torch.ones(layers * r, dtype=torch.bool)
    for step in range(steps):
        now = used[:, step].reshape(-1)
        for layer in range(layers):
            residency.note(layer, used[layer, step].nonzero().flatten())
        counted = step >= steps // 2
        if counted:
            u, hot = int(now.sum()), int((now & resident).sum())
            keys = layers * r - int(resident.sum())
            counts.used, counts.found, counts.cold_keys = counts.used + u, counts.found + hot, counts.cold_keys + keys
            each = d * (COMPUTE + 2 * GRADIENT)  # a value comes, the gradients of key and value leave
            counts.without += layers * r * d * COMPUTE + u * each
            counts.crossed += keys * d * COMPUTE + (u - hot) * each + (2 * u - hot) * ID
        residency.end_step(places, resident, allowed)
        moves = residency.moves(places, resident, allowed, layers * r)
        resident[moves.leave], resident[moves.enter] = False, True
        if counted:
            entered, left = len(moves.enter), len(moves.leave)
            counts.entered, counts.left = counts.entered + entered, counts.left + left
            counts.crossed += 2 * (entered + left) * (d * STATE + COUNT)
    return counts
