"""The ranks of a node begin to share one copy of their tables."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from peft_bridge.torch_private import timeout_of

from ..gradient.node_sum import NodeSum, SumPlaces
from ..table.node_rows import NodePlaces, NodeRows
from ..table.row_table import RowTable
from ..transport import shared_memory
from ..transport.node_ranks import NodeRanks
from ..transport.shared_memory import Layout, SharedMemory
from .broadcasts import broadcast, group_device

logger = logging.getLogger(__name__)


def can_be_shared(table: RowTable) -> bool:
    """Whether a table is one that ranks can share: its rows are in host memory and have values."""
    return table.on_host and table.rows.is_cpu


def _gathered(group: dist.ProcessGroup, given: Any) -> list[Any]:
    everywhere: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everywhere, given, group=group)
    return everywhere


class Node:
    """What the ranks of this node share: tables, and the sums of their gradients.

    Attributes:
        tables: in the same order on all ranks.
        sum: makes means of their gradients.
        group: of all ranks.
        nodes: of each node its ranks in the group; `members` are those of this node.
        peers: the ranks with this one's place on all nodes that have one; None: there is one node.
    """

    def __init__(
        self,
        tables: Sequence[RowTable],
        ranks: NodeRanks,
        total: NodeSum,
        group: dist.ProcessGroup,
        nodes: Sequence[Sequence[int]],
        peers: dist.ProcessGroup | None,
    ) -> None:
        self.tables, self.ranks, self.sum = list(tables), ranks, total
        self.group, self.nodes, self.peers = group, nodes, peers
        self.members = next(members for members in nodes if dist.get_rank(group) in members)

    @classmethod
    def join(cls, tables: Sequence[RowTable], group: dist.ProcessGroup) -> Node | None:
        """Give the ranks of each node one copy of the tables, with the values of the group's first rank.

        All ranks of the group call it.

        Returns:
            None, on all ranks, where each keeps a copy of its own: no two of them are on one machine, or the system has
            no memory that they could share.

        Raises:
            RuntimeError: the ranks have other tables.
        """
        forms = [(len(t.rows), t.rows.shape[1], t.masters.dtype, t.compute_dtype, t.mode) for t in tables]
        machine = shared_memory.machine_of_process() if shared_memory.can_share() else None
        everywhere = _gathered(group, (machine, os.getpid(), forms, [t.rows.requires_grad for t in tables]))
        if any(other[2] != forms for other in everywhere):
            raise RuntimeError(
                "The ranks have MEFT adapters of other shapes or dtypes: give all ranks the same configuration, base "
                "model and dtype before the first forward pass in which ranks average gradients."
            )
        nodes: dict[str | None, list[int]] = {}
        for rank, (name, *_) in enumerate(everywhere):
            nodes.setdefault(name, []).append(rank)
        if not tables or None in nodes or max(map(len, nodes.values())) == 1:
            return None
        members, rank = nodes[machine], dist.get_rank(group)
        layout, layout_of_tables = Layout(), Layout()
        numbers = layout.place(32 * len(members))
        places = [
            NodePlaces.plan(layout_of_tables, (r, d), own, read_as, len(members), mode)
            for r, d, own, read_as, mode in forms
        ]
        wide = [(r, d, torch.promote_types(dtype, torch.float32)) for r, d, dtype, *_ in forms]
        sums = SumPlaces.plan(layout, wide, len(members), max(map(len, nodes.values())))
        first = members[0], everywhere[members[0]][1]
        memory = _memory(group, *first, layout.size)
        # Memory of its own, which goes when all tables have left.
        memory_of_tables = _memory(group, *first, layout_of_tables.size, users=True) if memory is not None else None
        if memory is None or memory_of_tables is None:
            return None
        timeout = timeout_of(group)
        ranks = NodeRanks(
            members.index(rank), [everywhere[m][1] for m in members], memory.numbers(numbers, 4 * len(members)), timeout
        )
        peers, shares = None, min(map(len, nodes.values())) if len(nodes) > 1 else None
        if shares is not None and ranks.rank < shares:
            peers = _peers(group, tuple(ranks_of_node[ranks.rank] for ranks_of_node in nodes.values()), timeout)
        total = NodeSum(
            ranks, memory, sums, world=len(everywhere), peers=peers, shares=shares, device=group_device(group)
        )
        self = cls(tables, ranks, total, group, list(nodes.values()), peers)
        trained = everywhere[0][3]
        self._take_up(
            [
                NodeRows(ranks, memory_of_tables, place, sum(trained[:i]), max(1, sum(trained)))
                for i, place in enumerate(places)
            ]
        )
        return self

    def _take_up(self, shared: list[NodeRows]) -> None:
        """Only the first rank writes what all share; the others give the memory of their own back before it does."""
        if self.ranks.leads:
            self.ranks.barrier()
        for table, node in zip(self.tables, shared, strict=True):
            own = table.take_up(node)
            if self.ranks.leads:
                if self.peers is not None:  # the rows of the first node
                    broadcast(own, dist.get_global_rank(self.group, 0), self.peers)
                table.write_shared(own)
        if not self.ranks.leads:
            self.ranks.barrier()
        self.ranks.barrier()
        for table in self.tables:
            table.shared_rows_written()

    def average_gradients(self, answer: bool = False, *, shadows: bool = False, divisor: int = 0) -> bool:
        """Replace the gradients of the tables by their means over all ranks.

        Args:
            answer: of this rank, to a question of all ranks.
            shadows, divisor: as of `NodeSum.average`.

        Returns:
            whether any rank has answered yes.
        """
        trained = [(i, table.rows) for i, table in enumerate(self.tables) if table.rows.requires_grad]
        try:
            answer = self.sum.average(trained, answer, shadows=shadows, divisor=divisor)
        except BaseException:
            self.ranks.fail()  # the others would wait for this rank
            raise
        self.ranks.summed = True
        return answer

    # ------------------------------------------------------------------ ranks that have no batch left

    def step_among(self, present: Sequence[int]) -> None:
        """Let these ranks of the group make the next steps; all ranks call it, before one of these begins."""
        stepping = [place for place, rank in enumerate(self.members) if rank in present]
        if stepping == self.ranks.stepping:
            return
        for table in self.tables:  # the steps of those before
            table.wait_for_update()
        self.ranks.stepping = stepping
        if self.ranks.rank not in stepping:
            for table in self.tables:
                if table.node is not None:
                    table.node.stay_out(table.entry)

    def end_uneven_steps(self, last: Sequence[int]) -> None:
        """Let all ranks make the next steps, with the rows and moments of those that have made the last ones.

        Args:
            last: these, in the group. All ranks call it, and share all tables.
        """
        for table in self.tables:
            table.wait_for_update()
        self.ranks.barrier()
        behind = [set(last).isdisjoint(members) for members in self.nodes]
        if any(behind):
            if self.ranks.leads:
                source = dist.get_global_rank(self.group, self.nodes[behind.index(False)][0])
                for table in self.tables:
                    self._send_shared(table, source)
            self.ranks.barrier()
        if self.members[self.ranks.rank] not in last:
            for table in self.tables:
                table.catch_up()
        self.ranks.stepping = list(range(len(self.ranks)))

    def _send_shared(self, table: RowTable, source: int) -> None:
        """Give the first ranks of all nodes what is in the memory that one of them shares."""
        assert table.node is not None
        assert self.peers is not None
        for tensor in (table.masters, *table.node.moments.tensors().values()):
            broadcast(tensor, source, self.peers)
        if dist.get_rank() != source:
            table.write_shared(table.masters)


_groups: dict[tuple[dist.ProcessGroup, tuple[int, ...]], dist.ProcessGroup] = {}  # a group is made once


def _peers(group: dist.ProcessGroup, ranks: tuple[int, ...], timeout: float) -> dist.ProcessGroup:
    """Some ranks of a group as one of their own; they all come here the first time."""
    if (group, ranks) not in _groups:
        _groups[group, ranks] = dist.new_group(
            [dist.get_global_rank(group, rank) for rank in ranks],
            timeout=timedelta(seconds=timeout),
            backend=dist.get_backend_config(group),
            use_local_synchronization=True,
        )
    return _groups[group, ranks]


def _memory(
    group: dist.ProcessGroup, first: int, process: int, size: int, *, users: bool = False
) -> SharedMemory | None:
    """Memory that a node's first rank makes and the others open; None on all ranks if one of them cannot."""
    memory, reason = None, ""
    leads = dist.get_rank(group) == first
    try:
        memory = SharedMemory.create(size, users=users) if leads else None
    except OSError as error:
        reason = str(error)
    offers = _gathered(group, memory.descriptor if memory is not None else None)
    try:
        if not leads and offers[first] is not None:
            memory = SharedMemory.open(process, offers[first], size, users=users)
    except OSError as error:
        reason = str(error)
    reasons = _gathered(group, None if memory is not None else reason or "the first rank has made none")
    if memory is not None:
        memory.close()
    failed = next((reason for reason in reasons if reason is not None), None)
    if failed is None:
        return memory
    if dist.get_rank(group) == 0:
        logger.warning("MEFT: each rank keeps a copy of the rows, since ranks cannot share memory (%s).", failed)
    return None
