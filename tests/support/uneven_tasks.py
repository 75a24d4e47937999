"""What ranks with other numbers of batches do in `DistributedDataParallel.join()`, for `meft/test_uneven_ranks.py`: as
processes of `test_ddp.py` and `test_nodes.py`.
"""

import copy
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from meft.gradient.row_gradient import RowGradient, as_row_gradient
from meft.optim.optimizer_hook import RowSteps
from meft.optim.rank_average import RankAverage
from peft_bridge import follow_joins
from tests.support import node_tasks
from tests.support.tiny_meft import Tiny

# Of each epoch the batches of each rank; a step of all ranks, outside of a `join()`, comes after the last.
FEWER, NONE = [[2, 4], [3, 1]], [[0, 2], [2, 1]]

# ---------------------------------------------------------------------- tables alone, with gradients of whole numbers


class _Given(torch.autograd.Function):
    """The loss of a net in whose backward pass tables get gradients."""

    @staticmethod
    def forward(ctx, weight, net, gradients):
        ctx.net, ctx.gradients = net, gradients
        return weight.sum()

    @staticmethod
    def backward(ctx, grad):
        for table, given in zip(ctx.net.tables, ctx.gradients, strict=True):
            if given is not None and table.rows.grad is None:
                table.rows.grad = RowGradient(*given, table.rows)
            elif given is not None:
                as_row_gradient(table.rows.grad, table.rows).add_(RowGradient(*given, table.rows))
        ctx.net.ranks.note_backward()
        return torch.ones_like(ctx.net.weight), None, None


class Net(nn.Module):
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
        return _Given.apply(self.weight, self, gradients)


def given_to(ranks, step, number):
    """The gradients that these ranks have of a table in a step."""
    given = [node_tasks.gradient_of(step, rank, number) for rank in ranks]
    return [gradient for gradient in given if gradient is not None]


def step_tables(tables, optimizer, norms):
    norms.append(float(torch.nn.utils.clip_grad_norm_([table.rows for table in tables], 20.0)))
    optimizer.step()
    optimizer.zero_grad()


def run_tables(rank, name, epochs, of_present):
    """Args: of_present: whether means are over the ranks that have a batch."""
    tables = node_tasks.tables_of(*node_tasks.DTYPES[name], seed=rank)  # the first rank's count
    optimizer, norms, kept, states = node_tasks.optimizer_of(tables), [], [], []
    wrapped = DistributedDataParallel(Net(tables))
    for epoch, counts in enumerate([*epochs, None]):
        joined = wrapped.join(divide_by_initial_world_size=not of_present) if counts else nullcontext()
        with joined:
            for i in range(counts[rank] if counts else 1):
                numbers = range(len(tables))
                wrapped([node_tasks.gradient_of(10 * epoch + i, rank, number) for number in numbers]).backward()
                step_tables(tables, optimizer, norms)
                state = copy.deepcopy(optimizer.state_dict()["state"])
                kept += [(e["row_moments"], e["row_moments"].moments.counts.clone()) for e in state.values()]
        states.append(node_tasks.state_of(tables))
    return {
        "states": states,
        "norms": norms,
        "shared": [table.is_shared for table in tables],
        "kept": all(torch.equal(entry.moments.counts, then) for entry, then in kept),
    }


def tables_as_one_process(world, name, epochs, of_present):
    """What all ranks must have after each epoch, and of each epoch the norms."""
    tables = node_tasks.tables_of(*node_tasks.DTYPES[name], seed=0)
    optimizer, states, all_norms = node_tasks.optimizer_of(tables), [], []
    for epoch, counts in enumerate([*epochs, [1] * world]):
        norms = []
        for i in range(max(counts)):
            present = [rank for rank in range(world) if i < counts[rank]]
            for number, table in enumerate(tables):
                given = given_to(present, 10 * epoch + i, number)
                if given:
                    wide = torch.promote_types(table.rows.dtype, torch.float32)
                    whole = torch.zeros(node_tasks.SHAPES[number], dtype=wide)
                    for rows, values in given:
                        whole.index_add_(0, rows, values.to(wide))
                    rows = torch.cat([g[0] for g in given]).unique()
                    divisor = len(present) if of_present else world
                    table.rows.grad = RowGradient(rows, whole[rows] / divisor, table.rows)
            step_tables(tables, optimizer, norms)
        states.append(node_tasks.state_of(tables))
        all_norms.append(norms)
    return states, all_norms


# ---------------------------------------------------------------------- models under DDP


def lora():
    return get_peft_model(
        Tiny.base(2), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )


def batch_of(rank, number):
    return Tiny.batch(2, 6, seed=100 * rank + number)


def step(model, optimizer):
    torch.nn.utils.clip_grad_norm_(Tiny.trainable(model), 0.5)
    optimizer.step()
    optimizer.zero_grad()


def state_and_logits(model):
    with torch.no_grad():
        logits = model(input_ids=batch_of(0, 999)).logits
    state = Tiny.whole_state(model)
    return {**(state or {n: p.detach().clone() for n, p in model.named_parameters()}), "logits": logits}


def by_accelerate(ddp, **settings):
    """`Accelerator.join_uneven_inputs` of a run on several GPUs; on a CPU it does nothing."""
    return Accelerator.join_uneven_inputs(
        SimpleNamespace(multi_device=True, _dataloaders=[]), [ddp], even_batches=False
    )


def of_present(ddp):
    return Join([ddp], divide_by_initial_world_size=False)


def with_head():
    """The output layer is trained, too."""
    return node_tasks.adapted(modules_to_save=["lm_head"])


def run_model(rank, join=DistributedDataParallel.join, micro=1, make=node_tasks.adapted, **fields):
    """What a rank has after each epoch, and after a step of all.

    Args:
        micro: micro-batches a step.
    """
    model = make(**fields)
    wrapped, optimizer, found, number = DistributedDataParallel(model), Tiny.adamw(model), [], 0
    for counts in [*NONE, None]:
        with join(wrapped) if counts else nullcontext():
            for i in range(counts[rank] if counts else 1):
                for k in range(micro):
                    batch = batch_of(rank, number + micro * i + k)
                    with wrapped.no_sync() if k + 1 < micro else nullcontext():
                        (wrapped(input_ids=batch, labels=batch).loss / micro).backward()
                step(model, optimizer)
        number += micro * max(counts) if counts else 0
        found.append(state_and_logits(model))
    return {"states": found, "followed": "join_hook" in vars(wrapped)}


def model_as_one_process(of_present=False, micro=1, make=node_tasks.adapted):
    model = make()
    optimizer, found, number = Tiny.adamw(model), [], 0
    for counts in [*NONE, [1, 1]]:
        for i in range(max(counts)):
            present = [rank for rank in range(2) if i < counts[rank]]
            for rank in present:
                for k in range(micro):
                    batch = batch_of(rank, number + micro * i + k)
                    loss = model(input_ids=batch, labels=batch).loss
                    (loss / micro / (len(present) if of_present else 2)).backward()
            step(model, optimizer)
        number += micro * max(counts)
        found.append(state_and_logits(model))
    return found


def written(model):
    """What a user does to one of the tables."""
    with torch.no_grad():
        Tiny.tables(model)[1].rows.mul_(0.5)


def run_written(rank):
    """The rank that goes on alone writes rows."""
    model = node_tasks.adapted()
    wrapped, optimizer = DistributedDataParallel(model), Tiny.adamw(model)
    with wrapped.join():
        for number in range(1 + 2 * rank):
            wrapped(input_ids=batch_of(rank, number), labels=batch_of(rank, number)).loss.backward()
            step(model, optimizer)
            if number == 1:
                written(model)
    shared = [table.is_shared for table in Tiny.tables(model)]
    wrapped(input_ids=batch_of(rank, 3), labels=batch_of(rank, 3)).loss.backward()
    step(model, optimizer)
    again = [table.is_shared for table in Tiny.tables(model)]
    return {"state": Tiny.whole_state(model), "shared": shared, "again": again}


def written_as_one_process():
    model = node_tasks.adapted()
    optimizer = Tiny.adamw(model)
    for number in range(4):
        for rank in (0, 1) if number in (0, 3) else (1,):
            (model(input_ids=batch_of(rank, number), labels=batch_of(rank, number)).loss / 2).backward()
        step(model, optimizer)
        if number == 1:
            written(model)
    return Tiny.whole_state(model)


def run_early(rank):
    """The first rank has a batch fewer, and nobody goes on; then all go on together."""
    model = node_tasks.adapted()
    wrapped, optimizer, error = DistributedDataParallel(model), Tiny.adamw(model), "none"
    try:
        with wrapped.join(throw_on_early_termination=True):
            for number in range(1 + rank):
                wrapped(input_ids=batch_of(rank, number), labels=batch_of(rank, number)).loss.backward()
                step(model, optimizer)
    except RuntimeError as raised:
        error = str(raised)
    again = DistributedDataParallel(model)
    with again.join(enable=False):
        again(input_ids=batch_of(rank, 2), labels=batch_of(rank, 2)).loss.backward()
        step(model, optimizer)
    return {"error": error, "state": Tiny.whole_state(model)}


def run_unknown(rank):
    """An adapter that a DDP does not follow: of a copy, and of one that was followed by nobody when it was made."""
    model = node_tasks.adapted()
    wrapped, errors = DistributedDataParallel(model), []
    copied = copy.deepcopy(wrapped)
    del wrapped.join_hook
    for ddp in (wrapped, copied):
        try:
            with ddp.join():
                ddp(input_ids=batch_of(rank, 0))
        except RuntimeError as error:
            errors.append(str(error))
    return errors


MODELS = {
    "in place": {},
    "of present": {"join": of_present, "make": with_head},
    "micro-batches": {
        "join": by_accelerate,
        "micro": 2,
        "delay": 2e-4,
        "retrieval": "stream",
        "backward_rows": "refetch",
    },
    "in backward": {"delay": 2e-4, "retrieval": "device-rows", "row_optimizer": {"in_backward": True}},
    "LoRA": {"make": lora},
}
TABLES = [("float32", FEWER, False), ("float32 read as bfloat16", NONE, True)]
NODES = [("two and two", "float32", [[3, 1, 0, 2], [0, 0, 2, 1]], False)]
NODES += [("three and one", "float32 read as bfloat16", [[0, 0, 0, 2], [1, 1, 1, 3]], True)]


def tasks(rank):
    """Name -> what a rank of two does."""
    models = {f"uneven, {name}": partial(run_model, rank, **fields) for name, fields in MODELS.items()}
    tables = {f"uneven tables {number}": partial(run_tables, rank, *case) for number, case in enumerate(TABLES)}
    together = {**models, **tables, "uneven, written": partial(run_written, rank)}
    apart = ["uneven, in place", "uneven, in backward", *tables]
    return {
        **together,
        **{f"apart, {name}": partial(node_tasks.apart, together[name]) for name in apart},
        "uneven, early": partial(run_early, rank),
        "uneven, unknown": partial(run_unknown, rank),
    }
