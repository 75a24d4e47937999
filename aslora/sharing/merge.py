"""One merge of one B-group, which happens whole or not at all."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .merge_math import groups_of, merged
from .sharded import sharded_like
from .shared_tensors import SharedB
from .ties import Ties


class Merge:
    """A merge: all that can fail is done when it is made, the writing comes after.

    The layers of owner `lower` take the row of owner `upper`, which keeps its value and average; with `mean` these
    become the means of both rows, weighted by their numbers of layers. All averages are updated at the same steps, so
    they have one common count. No optimizer state is written: the gradient of all goes to the upper row from now on,
    and what the moments of other rows do to these is overwritten after each step.

    Values come before the map: what is interrupted between leaves equal rows, which are found and tied before the next
    pass; no further merges follow then.
    """

    @torch.no_grad()
    def __init__(self, member: SharedB, lower: int, upper: int, mean: bool, distance: float) -> None:
        self.member = member
        groups = groups_of(member.ties.owners)
        layers = groups[lower] + groups[upper]
        weight = len(groups[lower]) / len(layers) if mean else 0.0
        B = member.full_tensor()
        device = B.device
        self.index = torch.tensor(layers, device=device)
        self.values = [_mean(rows[upper], rows[lower], weight) for rows in (B, member.average)]
        self.sharded = self.whole = None
        if isinstance(member.stacked_B, DTensor):
            self.sharded = sharded_like(member.stacked_B, _with_rows(B, self.index, self.values[0]))
        elif member.held_elsewhere:
            self.whole = _with_rows(B, self.index, self.values[0])
        self.ties = Ties(merged(member.ties.owners, lower, upper))
        self.rows = torch.tensor(self.ties.owners, device=device)
        self.slot = len(member.merges())
        self.entry = torch.tensor([member.step, lower, upper], device=device)
        self.distance = distance

    @torch.no_grad()
    def write_values(self) -> None:
        """Write B and the averages."""
        B, average = self.member.stacked_B, self.member.average
        if self.sharded is not None:
            B.copy_(self.sharded)
        elif self.whole is not None:
            self.member.overwrite(self.whole)
        else:
            _with_rows(B.detach(), self.index, self.values[0], in_place=True)
        _with_rows(average, self.index, self.values[1], in_place=True)

    @torch.no_grad()
    def write_map(self) -> None:
        """Write the record of the merge, and the map."""
        self.member.history[self.slot] = self.entry
        self.member.distances[self.slot] = self.distance
        self.member.rows.copy_(self.rows)
        self.member.ties = self.ties
        self.member.forget_views()


def _mean(upper: Tensor, lower: Tensor, weight: float) -> Tensor:
    """The value of the upper row, moved to that of the lower one by `weight`, rounded once."""
    if not weight:
        return upper.clone()
    wide = torch.promote_types(upper.dtype, torch.float32)
    return torch.lerp(upper.to(wide), lower.to(wide), weight).to(upper.dtype)


def _with_rows(rows: Tensor, index: Tensor, value: Tensor, in_place: bool = False) -> Tensor:
    """Rows [n, ...] with `value` at `index`."""
    rows = rows if in_place else rows.clone()
    return rows.index_copy_(0, index, value.expand(len(index), *value.shape))
