"""Row gradients of the ranks of a node, and of several nodes, become their mean: summed in shared memory, in the order
of the ranks, so that the result does not depend on who comes first.

Of each table the ranks agree on the union of their touched rows. Then, block by block, each rank copies its values
into memory of its own that all can read, and sums its share of the block over the ranks. The mean exists once a node:
the gradient of each rank reads it, and copies it only if somebody writes into it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..transport.node_ranks import NodeRanks
from ..transport.shared_memory import Layout, SharedMemory
from .host.drain import squares
from .row_gradient import RowGradient, as_row_gradient

BLOCK_BYTES = 2 << 20  # of a rank's values at a time; each rank has two blocks


@dataclass(frozen=True)
class SumPlaces:
    """Where in shared memory the ranks' parts are.

    Attributes:
        forms: of each table (r, d, dtype of the sums).
        masks: of each table uint8 [ranks, r + 1]: the rows that a rank has touched; last, whether it has a gradient.
        union: uint8, the masks over all nodes, of all tables in turn.
        numbers: int64 [tables, ranks + 1], then float64 [tables, ranks].
        blocks: [2, ranks] blocks of `block_bytes`.
    """

    forms: tuple[tuple[int, int, torch.dtype], ...]
    masks: tuple[int, ...]
    union: int
    numbers: int
    blocks: int
    block_bytes: int

    @classmethod
    def plan(cls, layout: Layout, forms: Sequence[tuple[int, int, torch.dtype]], ranks: int) -> SumPlaces:
        """Take places for tables of these forms."""
        row = max(d * dtype.itemsize for _, d, dtype in forms)
        largest = max(r * d * dtype.itemsize for r, d, dtype in forms)
        block = max(row, min(BLOCK_BYTES // row * row, largest))
        return cls(
            tuple(forms),
            tuple(layout.place(ranks * (r + 1)) for r, _, _ in forms),
            layout.place(sum(r + 1 for r, _, _ in forms)),
            layout.place(8 * len(forms) * (2 * ranks + 1)),
            layout.place(2 * ranks * block),
            block,
        )


class NodeSum:
    """Makes means of row gradients, for one rank of a node.

    Args:
        world: ranks of all nodes.
        leaders: of this process, if it is its node's first rank and there are several nodes: the group of those.
        nodes: how many there are.
        device: where tensors have to be for `leaders`.

    Attributes:
        bytes_between_ranks: bytes that this rank has written for other ranks of its node to read.
        bytes_between_nodes: bytes that this process has put into reductions over nodes.
    """

    def __init__(
        self,
        ranks: NodeRanks,
        memory: SharedMemory,
        places: SumPlaces,
        *,
        world: int,
        nodes: int = 1,
        leaders: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._ranks, self._memory, self._places = ranks, memory, places
        self._world, self._nodes, self._leaders = world, nodes, leaders
        self._device = device if device is not None else torch.device("cpu")
        self.bytes_between_ranks = self.bytes_between_nodes = 0
        n, tables = len(ranks), len(places.forms)
        self._masks = [
            memory.tensor(at, (n, r + 1), torch.uint8) for at, (r, _, _) in zip(places.masks, places.forms, strict=True)
        ]
        integers = memory.numbers(places.numbers, tables * (n + 1))
        self._held = [integers[i * n : (i + 1) * n] for i in range(tables)]  # whether a rank still reads the last mean
        self._descriptors = integers[tables * n :]
        floats = memory.fractions(places.numbers + 8 * tables * (n + 1), tables * n)
        self._squares = [floats[i * n : (i + 1) * n] for i in range(tables)]
        self._means: list[SharedMemory | None] = [None] * tables
        self._readers: list[weakref.ref[object] | None] = [None] * tables
        self._blocks = 0  # summed so far

    def average(self, tables: Sequence[tuple[int, Tensor]]) -> None:
        """Replace the gradients of some tables by their means over all ranks; all ranks call it.

        Args:
            tables: place among the forms, and the parameter.
        """
        me = self._ranks.rank
        own: dict[int, tuple[Tensor, Tensor] | None] = {}
        for i, parameter in tables:
            own[i] = None if parameter.grad is None else as_row_gradient(parameter.grad, parameter).stored()
            self._mark(i, own[i])
            reader = self._readers[i]
            self._held[i][me] = int(self._means[i] is None or (reader is not None and reader() is not None))
        self._ranks.barrier()
        unions = self._unions([i for i, _ in tables])
        touched = [(i, parameter) for i, parameter in tables if bool(unions[i][-1])]
        self._renew([i for i, _ in touched if any(self._held[i])])
        sums = {i: self._sum(i, unions[i][:-1].nonzero().flatten(), own.pop(i)) for i, _ in touched}
        self._ranks.barrier()
        for i, parameter in touched:
            known = sum(self._squares[i]) if self._places.forms[i][2] == torch.float32 else None
            rows, values = sums.pop(i)
            self._readers[i] = weakref.ref(values.untyped_storage())
            parameter.grad = RowGradient.shared(rows, values, parameter, known)

    def forget_means(self) -> None:
        """Give the memory of the last means back, where no gradient has it; the next ones get other memory."""
        self._means = [None] * len(self._means)

    def any_over_nodes(self, answer: bool) -> bool:
        """Whether any node answers yes; all ranks of a node give the same answer."""
        if self._nodes == 1:
            return answer
        if self._leaders is not None:
            answer = bool(self._over_nodes(torch.tensor([answer], dtype=torch.uint8), dist.ReduceOp.MAX))
        return self._ranks.any(answer)

    def _mark(self, i: int, own: tuple[Tensor, Tensor] | None) -> None:
        mask = self._masks[i][self._ranks.rank]
        mask.zero_()
        if own is not None:
            mask[-1] = 1
            mask[own[0]] = 1
        self.bytes_between_ranks += len(mask)

    def _unions(self, tables: list[int]) -> dict[int, Tensor]:
        """Of each table the rows that any rank has touched, uint8 [r + 1]."""
        unions = {i: self._masks[i].amax(0) for i in tables}
        if self._nodes == 1 or not tables:
            return unions
        sizes = [len(unions[i]) for i in tables]
        shared = self._memory.tensor(self._places.union, (sum(sizes),), torch.uint8)
        if self._leaders is not None:
            shared.copy_(self._over_nodes(torch.cat(list(unions.values())), dist.ReduceOp.MAX))
        self._ranks.barrier()
        return dict(zip(tables, shared.split(sizes), strict=True))

    def _over_nodes(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        there = tensor.to(self._device)
        dist.all_reduce(there, op=op, group=self._leaders)
        self.bytes_between_nodes += tensor.nbytes
        return there

    def _renew(self, tables: list[int]) -> None:
        """Take new memory for means of which somebody still reads the last one; all ranks know which these are."""
        if not tables:
            return
        sizes = [r * d * dtype.itemsize for r, d, dtype in (self._places.forms[i] for i in tables)]
        made: list[SharedMemory] = []
        if self._ranks.leads:
            made = [SharedMemory.create(size) for size in sizes]
            for i, memory in zip(tables, made, strict=True):
                assert memory.descriptor is not None
                self._descriptors[i] = memory.descriptor
        self._ranks.barrier()
        if not made:
            first = self._ranks.processes[0]
            made = [SharedMemory.open(first, self._descriptors[i], size) for i, size in zip(tables, sizes, strict=True)]
        self._ranks.barrier()
        for i, memory in zip(tables, made, strict=True):
            memory.close()
            self._means[i] = memory

    def _sum(self, i: int, rows: Tensor, own: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """The mean over all ranks of a table's gradients on `rows`, once the last barrier has been passed."""
        _, d, dtype = self._places.forms[i]
        memory = self._means[i]
        assert memory is not None
        mean = memory.tensor(0, (len(rows), d), dtype)
        at_once = self._places.block_bytes // (d * dtype.itemsize)
        squared = 0.0
        for first in range(0, len(rows), at_once):
            block = slice(first, min(first + at_once, len(rows)))
            squared += self._sum_block(i, rows[block], own, mean[block])
        self._squares[i][self._ranks.rank] = squared
        return rows, mean

    def _sum_block(self, i: int, rows: Tensor, own: tuple[Tensor, Tensor] | None, mean: Tensor) -> float:
        """The sum of the squares of this rank's share."""
        self._blocks += 1
        if own is not None:
            begin, end = torch.searchsorted(own[0], rows[[0, -1]], right=False).tolist()
            end += int(end < len(own[0]) and bool(own[0][end] == rows[-1]))
            self._block(self._ranks.rank, end - begin, mean).copy_(own[1][begin:end])
            self.bytes_between_ranks += (end - begin) * mean.shape[1] * mean.element_size()
        self._ranks.barrier()
        share = self._ranks.part(len(rows))
        part = mean[share]
        masks = self._masks[i][:, rows].bool()
        before = masks[:, : share.start].sum(1).tolist()
        counts = masks[:, share].sum(1).tolist()
        written = False
        for rank, (offset, count) in enumerate(zip(before, counts, strict=True)):
            if not count:
                continue
            values = self._block(rank, offset + count, mean)[offset:]
            if count < len(part):
                if not written:
                    part.zero_()
                part.index_add_(0, masks[rank, share].nonzero().flatten(), values)
            elif written:
                part.add_(values)
            else:
                part.copy_(values)
            written = True
        if not written:
            part.zero_()  # another node's
        if self._nodes > 1:
            self._ranks.barrier()
            if self._leaders is not None:
                mean.copy_(self._over_nodes(mean, dist.ReduceOp.SUM))
            self._ranks.barrier()
        part.div_(self._world)
        return squares(part) or 0.0

    def _block(self, rank: int, count: int, like: Tensor) -> Tensor:
        """A rank's values, [count, d]: the one of its two blocks that nobody reads any more."""
        at = (self._blocks % 2 * len(self._ranks) + rank) * self._places.block_bytes
        return self._memory.tensor(self._places.blocks + at, (count, like.shape[1]), like.dtype)
