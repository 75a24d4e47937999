"""Row gradients of the ranks of a node, and of several nodes, become their mean: summed in shared memory, in the order
of the ranks, so that the result does not depend on who comes first.

Of each table the ranks agree on the union of their touched rows. Then, block by block, each rank copies its values
into memory of its own that all can read, and sums its share of the block over the ranks; a block has rows of one table
or of several. The mean exists once a node: the gradient of each rank reads it, and copies it only if somebody writes
into it. Over several nodes each rank then reduces its share with its peers, the ranks of the other nodes that have the
same share, so that all of them use their links.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..transport.node_ranks import NodeRanks
from ..transport.shared_memory import Layout, SharedMemory
from .host.drain import squares
from .host.mean import RowsOfRanks
from .row_gradient import RowGradient, as_row_gradient

BLOCK_BYTES = 8 << 20  # of a rank's values at a time, at most; each rank has two blocks
_SMALL_BLOCK = 256 << 10


def block_bytes(rows: int, row: int, ranks: int) -> int:
    """Bytes of one of a rank's two blocks: all of them together have an eighth of the rows' bytes at most, so that they
    take little beside these, and each a row at least.
    """
    return _aligned(max(row, min(BLOCK_BYTES, rows, max(_SMALL_BLOCK, rows // (16 * ranks)))))


@dataclass(frozen=True)
class SumPlaces:
    """Where in shared memory the ranks' parts are.

    Attributes:
        forms: of each table (r, d, dtype of the sums).
        masks: of each table uint8 [ranks, r + 1]: the rows that a rank has touched; last, whether it has a gradient.
        union: uint8, the masks over all nodes, of all tables in turn, and an answer.
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
    def plan(
        cls, layout: Layout, forms: Sequence[tuple[int, int, torch.dtype]], ranks: int, most_ranks: int
    ) -> SumPlaces:
        """Take places for tables of these forms.

        Args:
            ranks: of this node.
            most_ranks: of any node; all nodes cut the same blocks.
        """
        row = max(d * dtype.itemsize for _, d, dtype in forms)
        block = block_bytes(sum(_aligned(r * d * dtype.itemsize) for r, d, dtype in forms), row, most_ranks)
        return cls(
            tuple(forms),
            tuple(layout.place(ranks * (r + 1)) for r, _, _ in forms),
            layout.place(sum(r + 1 for r, _, _ in forms) + 1),
            layout.place(8 * len(forms) * (2 * ranks + 1)),
            layout.place(2 * ranks * block),
            block,
        )


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


@dataclass(frozen=True)
class _Piece:
    """Rows of a table that are summed in one block.

    Attributes:
        table: place among the forms.
        rows: int64 [n], of the union, which begin with its row number `first`.
        own: of this rank's values [m, d] those of `rows`; None: it has no gradient.
        offset: bytes from the beginning of each rank's block.
        mean: [n, d], the result.
    """

    table: int
    rows: Tensor
    own: Tensor | None
    offset: int
    mean: Tensor


class NodeSum:
    """Makes means of row gradients, for one rank of a node.

    Args:
        world: ranks of all nodes.
        peers: the group of this process and of the ranks of the other nodes that have the same share; None: there is
            one node, or this process has no share.
        shares: of several nodes the ranks of each that have one: as many as the smallest node has; None: there is one
            node.
        device: where tensors have to be for `peers`.

    Attributes:
        bytes_between_ranks: bytes that this rank has written for other ranks of its node to read.
        bytes_between_nodes: bytes of this process that were reduced over nodes.
    """

    def __init__(
        self,
        ranks: NodeRanks,
        memory: SharedMemory,
        places: SumPlaces,
        *,
        world: int,
        peers: dist.ProcessGroup | None = None,
        shares: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._ranks, self._memory, self._places = ranks, memory, places
        self._world, self._peers, self._several = world, peers, shares is not None
        self._shares, self._divisor = len(ranks) if shares is None else shares, world
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

    def average(
        self, tables: Sequence[tuple[int, Tensor]], answer: bool = False, *, shadows: bool = False, divisor: int = 0
    ) -> bool:
        """Replace the gradients of some tables by their means over all ranks; all ranks call it.

        Args:
            tables: place among the forms, and the parameter.
            answer: of this rank, to a question of all.
            shadows: this rank has no batch: it gives no gradient, and keeps those that it has.
            divisor: of the sums; 0: the number of all ranks.

        Returns:
            whether any rank of any node has answered yes.
        """
        me, self._divisor = self._ranks.rank, divisor or self._world
        own: dict[int, tuple[Tensor, Tensor] | None] = {}
        for i, parameter in tables:
            own[i] = None if shadows or parameter.grad is None else as_row_gradient(parameter.grad, parameter).to_copy()
            self._mark(i, own[i])
            reader = self._readers[i]
            self._held[i][me] = int(self._means[i] is None or (reader is not None and reader() is not None))
        answer = self._ranks.any(answer)
        unions, answer = self._unions([i for i, _ in tables], answer)
        touched = [(i, parameter) for i, parameter in tables if bool(unions[i][-1])]
        self._renew([i for i, _ in touched if any(self._held[i])])
        rows = {i: unions[i][:-1].nonzero().flatten() for i, _ in touched}
        for i in rows:
            self._squares[i][me] = 0.0
        for block in self._blocks_of(rows, own):
            self._sum(block)
        self._ranks.barrier()
        for i, parameter in touched if not shadows else []:
            known = sum(self._squares[i]) if self._places.forms[i][2] == torch.float32 else None
            values = self._mean(i, len(rows[i]))
            self._readers[i] = weakref.ref(values.untyped_storage())
            parameter.grad = RowGradient.shared(rows[i], values, parameter, known)
        return answer

    def forget_means(self) -> None:
        """Give the memory of the last means back, where no gradient has it; the next ones get other memory."""
        self._means = [None] * len(self._means)

    def _mark(self, i: int, own: tuple[Tensor, Tensor] | None) -> None:
        mask = self._masks[i][self._ranks.rank]
        mask.zero_()
        if own is not None:
            mask[-1] = 1
            mask[own[0]] = 1
        self.bytes_between_ranks += len(mask)

    def _unions(self, tables: list[int], answer: bool) -> tuple[dict[int, Tensor], bool]:
        """Of each table the rows that any rank has touched, uint8 [r + 1], and whether any node answers yes."""
        unions = {i: self._masks[i].amax(0) for i in tables}
        if not self._several:
            return unions, answer
        sizes = [len(unions[i]) for i in tables]
        shared = self._memory.tensor(self._places.union, (sum(sizes) + 1,), torch.uint8)
        all_of_node = torch.cat([*unions.values(), torch.tensor([answer], dtype=torch.uint8)])
        share = self._share(len(all_of_node))
        self._over_nodes([all_of_node[share]], dist.ReduceOp.MAX)
        shared[share].copy_(all_of_node[share])
        self._ranks.barrier()
        *parts, answered = shared.split([*sizes, 1])
        return dict(zip(tables, parts, strict=True)), bool(answered)

    def _share(self, count: int) -> slice:
        """This rank's share of `count` things that are summed."""
        rank, shares = self._ranks.rank, self._shares
        return slice(count * rank // shares, count * (rank + 1) // shares) if rank < shares else slice(0, 0)

    def _over_nodes(self, parts: Sequence[Tensor], op: dist.ReduceOp.RedOpType) -> None:
        """Reduce tensors over this rank's peers, in place, in one message for each dtype."""
        for dtype in dict.fromkeys(part.dtype for part in parts if part.numel()):
            packed = [part for part in parts if part.dtype == dtype]
            message = torch.cat([part.flatten() for part in packed]).to(self._device)
            dist.all_reduce(message, op=op, group=self._peers)
            self.bytes_between_nodes += message.nbytes
            for part, reduced in zip(packed, message.split([part.numel() for part in packed]), strict=True):
                part.copy_(reduced.view_as(part))

    def _renew(self, tables: list[int]) -> None:
        """Take new memory for means of which somebody still reads the last one; all ranks know which these are."""
        if not tables:
            return
        sizes = [r * d * dtype.itemsize for r, d, dtype in (self._places.forms[i] for i in tables)]
        made = [SharedMemory.create(size) for size in sizes] if self._ranks.leads else []
        for i, memory in zip(tables, made, strict=False):
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

    def _mean(self, i: int, count: int) -> Tensor:
        """The memory of a table's mean, [count, d]."""
        _, d, dtype = self._places.forms[i]
        memory = self._means[i]
        assert memory is not None
        return memory.tensor(0, (count, d), dtype)

    def _blocks_of(
        self, rows: dict[int, Tensor], own: dict[int, tuple[Tensor, Tensor] | None]
    ) -> Iterator[list[_Piece]]:
        """The unions' rows of some tables, divided into blocks."""
        block: list[_Piece] = []
        used, size = 0, self._places.block_bytes
        for i, union in rows.items():
            _, d, dtype = self._places.forms[i]
            mean, width, first = self._mean(i, len(union)), d * dtype.itemsize, 0
            given = own.pop(i)
            while first < len(union):
                if used + width > size:
                    yield block
                    block, used = [], 0
                end = min(len(union), first + (size - used) // width)
                piece, values = union[first:end], None
                if given is not None:
                    begin, last = torch.searchsorted(given[0], piece[[0, -1]] + torch.tensor([0, 1])).tolist()
                    values = given[1][begin:last]
                block.append(_Piece(i, piece, values, used, mean[first:end]))
                used, first = _aligned(used + (end - first) * width), end
        if block:
            yield block

    def _sum(self, block: list[_Piece]) -> None:
        """This rank's share of a block's means, and of the sums of their squares."""
        self._blocks += 1
        me = self._ranks.rank
        for piece in block:
            if piece.own is not None:
                self._place(me, piece)[: len(piece.own)].copy_(piece.own)
                self.bytes_between_ranks += piece.own.numel() * piece.mean.element_size()
        self._ranks.barrier()
        parts, divisor = [], 1 if self._several else self._divisor
        for piece in block:
            share, places = self._share(len(piece.rows)), [self._place(k, piece) for k in range(len(self._ranks))]
            ranks = RowsOfRanks(self._masks[piece.table], piece.rows, places)
            parts.append(piece.mean[share])
            squared = ranks.mean(share, divisor, parts[-1])
            self._squares[piece.table][me] += 0.0 if self._several else squared or 0.0
        if self._several:
            self._over_nodes(parts, dist.ReduceOp.SUM)
            for piece, part in zip(block, parts, strict=True):
                self._squares[piece.table][me] += squares(part.div_(self._divisor)) or 0.0

    def _place(self, rank: int, piece: _Piece) -> Tensor:
        """Where a rank's values of a piece are, [n, d]: in the one of its two blocks that nobody reads any more."""
        at = (self._blocks % 2 * len(self._ranks) + rank) * self._places.block_bytes
        return self._memory.tensor(self._places.blocks + at + piece.offset, piece.mean.shape, piece.mean.dtype)
