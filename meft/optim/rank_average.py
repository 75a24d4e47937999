"""Means of row gradients over ranks: data-parallel engines leave rows alone, and their gradients are averaged here.

At the end of each backward pass in which DistributedDataParallel or FSDP2 averages gradients, the ranks agree on the
union of their touched rows and average over it, so that clipping sees the same gradients on all ranks. The ranks of one
machine share one copy of the tables (`node`); where they cannot, and of rows on a device, each rank has a copy.

In DDP's `join()` a rank that has no batch left takes part in the averages with nothing, and in no steps. When the
context ends, it gets rows and moments of those that have gone on.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import GradientState
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from peft_bridge.torch_private import at_end_of_backward, backward_number, takes_uneven_inputs
from peft_bridge.training.data_parallel import DataParallel, around

from ..gradient.row_gradient import RowGradient, as_row_gradient
from ..memory.choice import LayerChoice
from ..table.row_table import RowTable
from ..transport.host_tensors import row_blocks
from .broadcasts import broadcast_moments, broadcast_rows, group_device
from .node import Node, can_be_shared
from .optimizer_hook import RowSteps
from .uneven_ranks import UnevenRanks


class RankAverage:
    """Averages the row gradients of one model's tables over the ranks that average its other gradients.

    It is a `peft_bridge.JoinFollower`.
    """

    def __init__(self, steps: RowSteps) -> None:
        self.steps = steps
        self._forget()

    def _forget(self) -> None:
        self._shared: weakref.ref[nn.Module] | None = None  # the engine whose ranks have the same rows
        self._parallel: DataParallel | None = None  # that of the last forward pass with a graph
        self._due = False  # whether its backward pass will average, and has not yet
        self._queued = -1
        self._uneven: UnevenRanks | None = None  # the last `join()`
        self.node: Node | None = None  # None: each rank has a copy of all tables
        # Of an engine that no pass shows; None: there is none, or it is gone.
        self.engine: Callable[[], DataParallel | None] = lambda: None

    def forget_shared(self) -> None:
        """The rows were written: the next forward pass gives all ranks the first rank's."""
        self._shared = None

    def __getstate__(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self._forget()

    def note_forward(self) -> None:
        """A forward pass begins: over which ranks its gradients are averaged.

        The first one inside of an engine, be it an evaluation, gives all ranks the first rank's rows.

        Raises:
            RuntimeError: it is inside of a `DistributedDataParallel.join()` that began without these tables, or
                `around` raises it.
        """
        parallel = self.engine() or around(self._tables())
        if parallel is not None and takes_uneven_inputs(parallel.engine) and not self._follows(parallel.engine):
            raise RuntimeError(
                "A DistributedDataParallel.join() leaves out MEFT adapters that are added after its "
                "DistributedDataParallel was made: wrap the model anew, and enter the context of that."
            )
        if parallel is not None and (self._shared is None or self._shared() is not parallel.engine):
            self._share(parallel)
        # After a pass inside of DDP its backward pass averages what came outside of it meanwhile, as DDP's own does.
        if torch.is_grad_enabled() and not (parallel is None and self._due):
            self._parallel, self.steps.averaged = parallel, parallel is not None
            self._due = parallel is not None and parallel.synchronises()
            if parallel is None and self.node is not None and not any(table.is_shared for table in self.node.tables):
                self.node.sum.forget_means()

    def note_backward(self) -> None:
        """Row gradients were made: average them when this backward pass is through."""
        task = backward_number()
        if self.node is not None:
            self.node.ranks.summed = False
        if self._queued == task:
            return
        if self._parallel is not None:
            if self._parallel.synchronises():
                self._queued = task
                at_end_of_backward(self.average)
        elif GradientState().sync_gradients:
            self._queued = task
            if self._choices():
                at_end_of_backward(self._choose)

    def _tables(self) -> list[RowTable]:
        return [table for name in sorted(self.steps.tables) for table in self.steps.tables[name]]

    def _choices(self) -> list[LayerChoice]:
        """What chooses the rows that a step updates."""
        found = dict.fromkeys(table.choice for table in self._tables())
        return [choice for choice in found if isinstance(choice, LayerChoice) and choice.active]

    def _choose(self, group: dist.ProcessGroup | None = None) -> None:
        """Leave the rows that the next step does not update out of the gradients.

        Args:
            group: the ranks that choose together; None: this rank chooses alone.
        """
        self._queued, choices = -1, self._choices()
        counting = [choice for choice in choices if choice.counts]
        if group is not None and counting:
            uses = torch.cat([choice.uses() for choice in counting]).to(group_device(group))
            dist.all_reduce(uses, group=group)
            for choice, own in zip(counting, uses.cpu().split([c.size for c in counting]), strict=True):
                choice.agree(own)
        for choice in choices:
            choice.join()
            choice.divide()

    def _share(self, parallel: DataParallel) -> None:
        """Give all ranks the first rank's rows."""
        tables, group = self._tables(), parallel.group
        if isinstance(parallel.engine, DistributedDataParallel):
            check_left_alone(tables, parallel.engine)
        with parallel.on_device():
            self.node = Node.join([table for table in tables if can_be_shared(table)], group)
            for table in tables:
                if self.node is None:
                    table.leave_node()
                if table.node is None:
                    broadcast_rows(table, group)
        self._shared = weakref.ref(parallel.engine)

    def _parted(self) -> bool:
        """Whether tables of this rank are not shared, or not any more: of a new adapter, written, cast, or trained
        outside of the engine.
        """
        return any(can_be_shared(table) and not table.is_shared for table in self._tables())

    def average(self) -> None:
        """Average the gradients of all passes since the last step over the ranks of the last one; all ranks call it."""
        self._queued, self._due = -1, False
        assert self._parallel is not None
        uneven = self._uneven
        with self._parallel.on_device():
            for choice in self._choices():
                choice.join()
            if uneven is not None and self._follows(self._parallel.engine) and uneven.goes_on:
                self._average_uneven(uneven, shadows=False)
            elif self._average(self._parallel.group):  # here, where all ranks come: a forward pass may be one's alone
                self._share(self._parallel)
                if self.node is not None:
                    self.node.ranks.summed = True
            self._choose(self._parallel.group)

    def _average(self, group: dist.ProcessGroup, *, shadows: bool = False, divisor: int = 0) -> bool:
        """Arguments as of `NodeSum.average`; whether tables of any rank are not shared any more."""
        node = self.node
        parted = node is not None and node.average_gradients(self._parted(), shadows=shadows, divisor=divisor)
        summed = node.tables if node is not None else []
        for table in self._tables():
            if table.rows.requires_grad and table not in summed:
                average_gradient(table, group, shadows=shadows, divisor=divisor)
        return parted

    # ------------------------------------------------------------------ ranks without a batch

    def _follows(self, engine: object) -> bool:
        """Whether the last `join()` of an engine has begun with these tables."""
        return self._uneven is not None and self._uneven.is_of(engine)

    def followed_modules(self) -> list[RowTable]:
        return self._tables()

    def join_begins(self, ddp: DistributedDataParallel, mean_of_present: bool) -> None:
        """All ranks come here: they have the same rows before one of them may have no batch at all.

        Raises:
            ValueError: rows are chosen or owned, which ranks without a batch would not know of.
        """
        if self._choices():
            raise ValueError(
                "train_rows and tasks (freeze_rows) are not supported inside of DistributedDataParallel.join(): give "
                "all ranks the same number of batches (drop_last=True)."
            )
        self._uneven = UnevenRanks(ddp, mean_of_present)
        self.steps.last_ranks.join_begins(ddp, mean_of_present)
        if self._shared is None or self._shared() is not ddp:
            self._share(DataParallel(ddp, ddp.process_group, lambda: True))

    def shadow_backward(self) -> None:
        if self._uneven is not None and any(table.rows.requires_grad for table in self._tables()):
            self._average_uneven(self._uneven, shadows=True)

    def _average_uneven(self, uneven: UnevenRanks, *, shadows: bool) -> None:
        present = uneven.marked(not shadows)
        if self.node is not None:
            self.node.step_among(present)
        self._average(uneven.group, shadows=shadows, divisor=uneven.divisor(present))  # shared again when it ends

    def all_joined(self, last: Sequence[int]) -> None:
        uneven = self._uneven
        assert uneven is not None
        uneven.end()
        if len(last) == dist.get_world_size(uneven.group):
            return
        self.steps.last_ranks.all_joined(last)
        if self.node is not None and uneven.marked(self._parted()):
            self._leave_node()
        shared = self.node.tables if self.node is not None else []
        if self.node is not None:
            self.node.end_uneven_steps(last)
        for table in self._tables():
            if table not in shared:
                broadcast_rows(table, uneven.group, last[-1])
                broadcast_moments(table, uneven.group, last[-1])

    def _leave_node(self) -> None:
        """Each rank goes on with a copy of all tables until the next forward pass."""
        for table in self._tables():
            table.leave_node()
        self.node = None
        self.forget_shared()


def check_left_alone(tables: list[RowTable], ddp: DistributedDataParallel) -> None:
    """Raises: RuntimeError: tables are in DDP's buckets, because it wraps more than the `PeftModel`, or none."""
    rows = {id(table.rows) for table in tables}
    taken = [n for n, p in ddp.module.named_parameters() if id(p) in rows and n not in ddp.parameters_to_ignore]
    if taken:
        raise RuntimeError(
            f"DistributedDataParallel holds MEFT's rows ({taken[0]}), because it does not wrap the PeftModel itself: "
            "set `module._ddp_params_and_buffers_to_ignore` of the module that it wraps to the names of its parameters "
            "with '.meft_keys.' or '.meft_values.' before wrapping it."
        )


def average_gradient(table: RowTable, group: dist.ProcessGroup, *, shadows: bool = False, divisor: int = 0) -> None:
    """Replace a table's gradient by its mean over the ranks, on the union of their rows.

    Args:
        shadows, divisor: as of `NodeSum.average`.
    """
    gradient = as_row_gradient(table.rows.grad) if table.rows.grad is not None and not shadows else None
    device = group_device(group, table.rows.device)
    touched = torch.zeros(
        len(table.rows) + 1, dtype=torch.uint8, device=device
    )  # the last: whether a gradient is there
    if gradient is not None:
        touched[-1] = 1
        touched[gradient.rows.to(device)] = 1
    dist.all_reduce(touched, op=dist.ReduceOp.MAX, group=group)
    if not bool(touched[-1]):
        return
    rows = touched[:-1].nonzero().flatten().to(table.rows.device)
    dtype = torch.promote_types(table.rows.dtype, torch.float32)
    values = torch.zeros(len(rows), table.rows.shape[1], dtype=dtype, device=table.rows.device)
    if gradient is not None:
        values.index_copy_(0, torch.searchsorted(rows, gradient.rows), gradient.row_values.to(dtype))
    for block in row_blocks(values):
        part = values[block].to(device)
        dist.all_reduce(part, group=group)
        values[block].copy_(part.div_(divisor or dist.get_world_size(group)))
    if not shadows:
        table.rows.grad = RowGradient(rows, values, table.rows)
