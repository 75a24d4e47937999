"""What ranks with other numbers of batches do in `DistributedDataParallel.join()`, for those of `test_ddp.py` and
`test_nodes.py`.
"""

import os
from contextlib import nullcontext

import torch
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from meft.gradient.row_gradient import RowGradient, as_row_gradient
from meft.optim.optimizer_hook import RowSteps
from meft.optim.rank_average import RankAverage
from meft.transport.shared_memory import VARIABLE
from peft_bridge import follow_joins
from tests.support import node_tasks
from tests.support.tiny_meft import Tiny

# ---------------------------------------------------------------------- tables alone, with gradients of whole numbers


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, net, gradients):
        ctx.net, ctx.gradients = net, gradients
        return weight.sum()

    @staticmethod
    def backward(ctx, grad):
        for table, given in zip(ctx.net.tables, ctx.gradients, strict=True):
            if given is None:
                continue
            gradient = RowGradient(*given, table.rows)
            if table.rows.grad is None:
                table.rows.grad = gradient
            else:
                as_row_gradient(table.rows.grad, table.rows).add_(gradient)
        ctx.net.ranks.note_backward()
        return torch.ones_like(ctx.net.weight), None, None


class Net(nn.Module):
    """Tables whose gradients are given to its forward pass."""

    def __init__(self, tables):
        super().__init__()
        self.weight, self.tables = nn.Parameter(torch.zeros(2)), nn.ModuleList(tables)
        self.steps = RowSteps()
        self.steps.tables = {"default": tables}
        self.ranks = RankAverage(self.steps)
        follow_joins(self.ranks)
        self._ddp_params_and_buffers_to_ignore = [n for n, _ in self.named_parameters() if n.startswith("tables.")]

    def forward(self, gradients):
        self.ranks.note_forward()
        return _Backward.apply(self.weight, self, gradients)


def gradients(step, rank):
    return [node_tasks.gradient_of(step, rank, number) for number in range(len(node_tasks.SHAPES))]


def step_tables(tables, optimizer, norms):
    norms.append(float(torch.nn.utils.clip_grad_norm_([table.rows for table in tables], 20.0)))
    optimizer.step()
    optimizer.zero_grad()


def run_tables(rank, name, epochs, mean_of_present):
    """Epochs in `join()`, of as many batches as each rank has, and then a step of all.

    Returns also whether all tables are shared.
    """
    tables = node_tasks.tables_of(*node_tasks.DTYPES[name], seed=rank)  # the first rank's count
    optimizer, net, norms = node_tasks.optimizer_of(tables), Net(tables), []
    wrapped, kept = DistributedDataParallel(net), []
    for epoch, counts in enumerate([*epochs, None]):
        joined = wrapped.join(divide_by_initial_world_size=not mean_of_present) if counts else nullcontext()
        with joined:
            for i in range(counts[rank] if counts else 1):
                wrapped(gradients(10 * epoch + i, rank)).backward()
                step_tables(tables, optimizer, norms)
                kept += [(entry, entry.moments.counts.clone()) for entry in _entries(optimizer.state_dict())]
        if epoch == 0:
            middle = node_tasks.state_of(tables) if tables[0].moments is not None else None
    return {
        "middle": middle,
        "state": node_tasks.state_of(tables),
        "norms": norms,
        "shared": [table.is_shared for table in tables],
        "kept": all(torch.equal(entry.moments.counts, then) for entry, then in kept),
        "weight": net.weight.grad is None,
    }


def _entries(state):
    from copy import deepcopy

    return [deepcopy(entry["row_moments"]) for entry in state["state"].values()]


def tables_as_one_process(world, name, epochs, mean_of_present):
    """What all ranks must have after the first epoch, and in the end; and of each step the norm."""
    tables = node_tasks.tables_of(*node_tasks.DTYPES[name], seed=0)
    optimizer, norms, middle = node_tasks.optimizer_of(tables), [], None
    for epoch, counts in enumerate([*epochs, [1] * world]):
        for i in range(max(counts)):
            present = [rank for rank in range(world) if i < counts[rank]]
            for number, table in enumerate(tables):
                given = [g for r in present if (g := node_tasks.gradient_of(10 * epoch + i, r, number)) is not None]
                if not given:
                    continue
                whole = torch.zeros(node_tasks.SHAPES[number], dtype=torch.promote_types(table.rows.dtype, torch.float32))
                for rows, values in given:
                    whole.index_add_(0, rows, values.to(whole.dtype))
                rows = torch.cat([g[0] for g in given]).unique()
                divisor = len(present) if mean_of_present else world
                table.rows.grad = RowGradient(rows, whole[rows] / divisor, table.rows)
            step_tables(tables, optimizer, norms)
        if middle is None:
            middle = node_tasks.state_of(tables)
    return middle, node_tasks.state_of(tables), norms


# ---------------------------------------------------------------------- models under DDP

RATES = {"row_optimizer": {"lr": 0.01, "weight_decay": 0.1}}  # the optimizer itself keeps nothing


def batch_of(rank, number):
    return Tiny.batch(2, 6, seed=100 * rank + number)


def train_epoch(model, optimizer, batches, synchronised=None, scale=1.0):
    """A step for each list of micro-batches."""
    for number, micro in enumerate(batches):
        for i, batch in enumerate(micro):
            quiet = model.no_sync() if synchronised and i + 1 < len(micro) else nullcontext()
            with quiet:
                (model(input_ids=batch, labels=batch).loss * (scale / len(micro))).backward()
        torch.nn.utils.clip_grad_norm_(Tiny.trainable(model), 0.5)
        optimizer.step()
        optimizer.zero_grad()


def run_model(rank, epochs, micro=1, join=None, **fields):
    """Epochs in `join()`, with an evaluation after each, then a step of all ranks."""
    row_optimizer = RATES["row_optimizer"] | fields.pop("row_optimizer", {})
    model = node_tasks.adapted(seed=0, row_optimizer=row_optimizer, **fields)
    wrapped, optimizer = DistributedDataParallel(model), torch.optim.SGD(Tiny.trainable(model), lr=0.1)
    join, logits, number = join or (lambda ddp: ddp.join()), [], 0
    for counts in epochs:
        with join(wrapped):
            train_epoch(wrapped, optimizer, micro_batches(rank, counts[rank], micro, number), synchronised=True)
        with torch.no_grad():
            logits.append(model(input_ids=batch_of(0, 999)).logits)
        number += micro * max(counts)
    train_epoch(wrapped, optimizer, micro_batches(rank, 1, micro, number), synchronised=True)
    return {"state": Tiny.whole_state(model), "logits": logits}


def micro_batches(rank, count, micro, first):
    return [[batch_of(rank, first + micro * i + k) for k in range(micro)] for i in range(count)]


def model_as_one_process(world, epochs, micro=1, of_present=False):
    model = node_tasks.adapted(seed=0, **RATES)
    optimizer, logits, number = torch.optim.SGD(Tiny.trainable(model), lr=0.1), [], 0
    for counts in [*epochs, [1] * world]:
        for i in range(max(counts)):
            present = [rank for rank in range(world) if i < counts[rank]]
            for rank in present:
                for k in range(micro):
                    batch = batch_of(rank, number + micro * i + k)
                    loss = model(input_ids=batch, labels=batch).loss
                    (loss / micro / (len(present) if of_present else world)).backward()
            torch.nn.utils.clip_grad_norm_(Tiny.trainable(model), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            logits.append(model(input_ids=batch_of(0, 999)).logits)
        number += micro * max(counts)
    return {"state": Tiny.whole_state(model), "logits": logits[:-1]}


def with_rows_apart(task):
    """The task with a copy of the rows for each rank."""
    os.environ[VARIABLE] = "0"
    try:
        return task()
    finally:
        del os.environ[VARIABLE]


__all__ = ["Join"]
