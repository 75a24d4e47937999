"""What the ranks of `tests/meft/test_ddp.py` do for `tests/meft/test_node.py`: one copy of the rows for both."""

import copy
import gc
import os
import time
import weakref
from functools import partial
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import meft
from meft.gradient import node_sum
from meft.gradient.row_gradient import RowGradient
from meft.optim.node import Node
from meft.table.row_table import RowTable
from meft.transport.shared_memory import VARIABLE
from tests.support.thread_streams import ThreadStreams
from tests.support.tiny_meft import Tiny

SHAPES = [(24, 8), (40, 8), (24, 6)]
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float32 read as bfloat16": (torch.float32, torch.bfloat16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float64": (torch.float64, torch.float64),
}
STEPS = 4


# ---------------------------------------------------------------------- tables alone, with gradients of whole numbers


def tables_of(dtype, read_as, seed):
    generator = torch.Generator().manual_seed(seed)
    tables = []
    for number, shape in enumerate(SHAPES):
        table = RowTable(shape, master=dtype, compute_dtype=read_as, on_host=True, pin=False)
        table.seed = number
        with torch.no_grad():
            table.rows.copy_(torch.randn(shape, generator=generator))
        tables.append(table)
    return tables


def gradient_of(step, rank, number):
    """Rows and values; None: this rank has no gradient of the table, and in one step none has a row."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + number)
    r, d = SHAPES[number]
    if step == 2 and number == 1:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, d)
    if rank and number == 2 and step % 2:
        return None
    rows = (torch.rand(r, generator=generator) < 0.4).nonzero().flatten()
    return rows, torch.randint(-8, 9, (len(rows), d), generator=generator).float()


def optimizer_of(tables):
    return meft.RowAdamW([table.rows for table in tables], lr=0.05, weight_decay=0.01)


def average(tables, node, step, rank):
    """Give all ranks the mean of their gradients in a step."""
    for number, table in enumerate(tables):
        given = gradient_of(step, rank, number)
        table.rows.grad = None if given is None else RowGradient(*given, table.rows)
    node.average_gradients()


def steps_of(tables, average, clip):
    """Steps of gradients that `average(step)` puts into place; the norms."""
    parameters = [table.rows for table in tables]
    optimizer, norms = optimizer_of(tables), []
    for step in range(STEPS):
        average(step)
        if clip:
            norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 20.0)))
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, norms


def state_of(tables):
    state = {}
    for number, table in enumerate(tables):
        with table.reading() as read:
            state |= {f"{number}.rows": table.masters.clone(), f"{number}.read": read.clone()}
        state |= {f"{number}.{name}": value.clone() for name, value in table.moments.tensors().items()}
    return state


def as_one_process(world, name, clip):
    tables = tables_of(*DTYPES[name], seed=0)

    def average(step):
        for number, table in enumerate(tables):
            given = [gradient_of(step, rank, number) for rank in range(world)]
            whole = torch.zeros(SHAPES[number], dtype=torch.promote_types(table.rows.dtype, torch.float32))
            for rows, values in filter(None, given):
                whole.index_add_(0, rows, values.to(whole.dtype))
            rows = torch.cat([g[0] for g in given if g is not None]).unique()
            table.rows.grad = RowGradient(rows, whole[rows] / world, table.rows)

    _, norms = steps_of(tables, average, clip)
    return state_of(tables), norms


def run_tables(rank, name, clip, block_bytes=None):
    """Args: block_bytes: so that a table's sum takes several blocks."""
    before = node_sum.BLOCK_BYTES
    node_sum.BLOCK_BYTES = block_bytes or before
    try:
        tables = tables_of(*DTYPES[name], seed=rank)  # the first rank's count
        node = Node.join(tables, torch.distributed.group.WORLD)
    finally:
        node_sum.BLOCK_BYTES = before
    stepped = [0] * len(tables)
    for number, table in enumerate(tables):

        def step(state, rows, *args, number=number, inner=table.step, **kwargs):
            stepped[number] += len(rows)
            return inner(state, rows, *args, **kwargs)

        table.step = step
    kept = []

    def average_and_keep(step):
        average(tables, node, step, rank)
        if step == 1:
            kept.extend((table.rows.grad, table.rows.grad.to_dense()) for table in tables)

    _, norms = steps_of(tables, average_and_keep, clip)
    return {
        "state": state_of(tables),
        "norms": norms,
        "kept": all(torch.equal(gradient.to_dense(), then) or clip for gradient, then in kept),
        "stepped": stepped,
        "bytes": node.sum.bytes_between_ranks,
        "between nodes": node.sum.bytes_between_nodes,
        "barriers": node.ranks.barriers,
        "shared": [table.is_shared for table in tables],
    }


# ---------------------------------------------------------------------- models under DDP


def adapted(delay=None, seed=0, dtype=torch.float64, **fields):
    model = Tiny.adapted(2, dtype, seed=seed, **fields)
    if delay is not None:
        model.base_model.engines["default"].use(ThreadStreams(seed, delay))
    return model


def mine(step, rank):
    return Tiny.batch(4, 6, seed=50 + step)[2 * rank : 2 * rank + 2]


def train(model, batches, optimizer, clip=0.05):
    for batch in batches:
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(Tiny.trainable(model), clip)
        optimizer.step()
        optimizer.zero_grad()


def run_memory(rank, folder):
    """What memory the rows are in, what a copy gets, and who writes into it."""
    wrote, write, descriptors = [], RowTable.write_shared, _descriptors()
    RowTable.write_shared = lambda self, masters: (wrote.append(self), write(self, masters))[1]
    try:
        model = adapted(seed=rank, dtype=torch.bfloat16)
        wrapped, optimizer = DistributedDataParallel(model), Tiny.adamw(model)
        train(wrapped, [mine(0, rank)], optimizer)
    finally:
        RowTable.write_shared = write
    tables = Tiny.tables(model)
    copied = copy.deepcopy(model)
    held = [t for table in tables for t in (table.masters, table._compute_copy, *table.moments.tensors().values())]
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:meft-rows" in line]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in maps]

    def within(tensor):
        return any(low <= tensor.data_ptr() < high for low, high in ranges)

    result = {
        "wrote": len(wrote),
        "shared": [within(tensor) for tensor in held],
        "of copies": [within(table.masters) or table.node is not None for table in Tiny.tables(copied)],
        "descriptors": _descriptors() - descriptors,
    }
    Tiny.tables(copied)[0].rows.data.mul_(2)  # nothing of the shared ones
    return result


WRITES = {
    "mul_": lambda rows: rows.mul_(2),
    "data": lambda rows: rows.data.mul_(2),
    "a part": lambda rows: rows[:].mul_(2),
    "+=": lambda rows: rows.__iadd__(rows.clone()),
    "out": lambda rows: torch.mul(rows.detach(), 2, out=rows.detach()),
    "foreach": lambda rows: torch._foreach_mul_([rows], 2),
    "assigned": lambda rows: rows.__setitem__(slice(None), 2 * rows),
    "other data": lambda rows: setattr(rows, "data", 2 * rows),
    "array": lambda rows: rows.detach().numpy().__imul__(2),
}


def run_written(rank):
    """Both ranks write: each write counts once, and the other rank's rows stay as they are until it writes, too."""
    model = adapted()
    wrapped, found = DistributedDataParallel(model), {}
    for name, write in WRITES.items():
        wrapped(input_ids=mine(0, rank)).logits.sum().backward()  # shared from here on
        table = Tiny.tables(model)[0]
        before, shared = table.masters.clone(), table.is_shared
        torch.distributed.barrier()
        if rank == 0:
            with torch.no_grad():
                write(table.rows)
        torch.distributed.barrier()
        untouched = torch.equal(table.masters, before)
        torch.distributed.barrier()
        if rank == 1:
            with torch.no_grad():
                write(table.rows)
        found[name] = shared and untouched == (rank == 1) and torch.equal(table.masters, 2 * before)
        with torch.no_grad():
            table.rows.copy_(before)
    wrapped(input_ids=mine(0, rank))
    before = Tiny.tables(model)[0].masters.clone()
    if rank == 0:  # an average is evaluated by one rank alone
        with torch.no_grad():
            Tiny.tables(model)[0].rows.mul_(3)
            model(input_ids=mine(0, rank))
            Tiny.tables(model)[0].rows.copy_(before)
    train(wrapped, [mine(0, rank)], Tiny.adamw(model))
    return {"found": found, "shared": all(t.is_shared for t in Tiny.tables(model)), "state": Tiny.whole_state(model)}


def _descriptors():
    return sum("meft-rows" in str(path) for path in map(_target, Path("/proc/self/fd").iterdir()))


def _target(path):
    try:
        return path.readlink()
    except OSError:
        return path


# What reads rows, in ways of their own.
READERS = {
    "refetch": {"retrieval": "stream", "backward_rows": "refetch"},
    "in backward": {"retrieval": "stream", "row_optimizer": {"in_backward": True}},
    "zero copy": {"dtype": torch.float32, "retrieval": "device-rows", "row_optimizer": {"zero_copy": True}},
    "masters": {"dtype": torch.bfloat16, "master_dtype": "bfloat16", "row_optimizer": {"moments": "float8"}},
}


def run_delayed(rank, steps=3, **fields):
    """The second rank evaluates between backward and step, late; the first one steps at once."""
    model = adapted(**fields)
    wrapped, optimizer, logits = DistributedDataParallel(model), Tiny.adamw(model), []
    for step in range(steps):
        batch = mine(step, rank)
        wrapped(input_ids=batch, labels=batch).loss.backward()
        before = Tiny.state(model) if rank == 1 else None
        if rank == 1:
            time.sleep(0.1)
            expected = {name: value.clone() for name, value in before.items()}
            with torch.no_grad():
                logits.append(model(input_ids=mine(9, 0)).logits)
            now = Tiny.state(model)
            assert all(torch.equal(now[name], expected[name]) for name in now)
        optimizer.step()
        optimizer.zero_grad()
    assert all(table.is_shared for table in Tiny.tables(model)) == (os.environ.get(VARIABLE) != "0")
    return {"state": Tiny.whole_state(model), "logits": logits}


def run_zero_copy(rank, zero_copy):
    model = adapted(2e-3, dtype=torch.float32, retrieval="stream", row_optimizer={"zero_copy": zero_copy})
    train(DistributedDataParallel(model), [mine(step, rank) for step in range(3)], Tiny.adamw(model))
    return {"state": Tiny.whole_state(model), "shared": all(t.is_shared for t in Tiny.tables(model))}


def run_kept_state(rank):
    """A state dict that is kept stays as it was; a new optimizer, and one that loads it, go on from there."""
    model = adapted()
    wrapped, optimizer = DistributedDataParallel(model), Tiny.adamw(model)
    train(wrapped, [mine(step, rank) for step in range(2)], optimizer)
    kept = copy.deepcopy(optimizer.state_dict())
    moments = [m["row_moments"] for m in kept["state"].values() if "row_moments" in m]
    before = [m.moments.exp_avg.clone() for m in moments]
    rows = {name: value.clone() for name, value in Tiny.state(model).items()}
    train(wrapped, [mine(step, rank) for step in range(2, 4)], optimizer)
    same = all(torch.equal(m.moments.exp_avg, was) for m, was in zip(moments, before, strict=True))
    first = Tiny.whole_state(model)
    model.load_state_dict(rows, strict=False)
    again = Tiny.adamw(model)
    again.load_state_dict(kept)
    train(wrapped, [mine(step, rank) for step in range(2, 4)], again)
    second = Tiny.whole_state(model)
    train(wrapped, [mine(4, rank)], Tiny.adamw(model))
    fresh = [int(table.moments.counts.max()) for table in Tiny.tables(model)]
    return {"same": same, "first": first, "second": second, "fresh": fresh, "state": Tiny.whole_state(model)}


def run_saved(rank, folder):
    """The first rank saves after two steps, and both go on."""
    model = adapted()
    wrapped, optimizer = DistributedDataParallel(model), Tiny.adamw(model)
    train(wrapped, [mine(step, rank) for step in range(2)], optimizer)
    if rank == 0:
        torch.save({"model": Tiny.state(model), "optimizer": optimizer.state_dict()}, folder / "resume.pt")
        model.base_model.save_training_state(folder / "training_state", optimizer)
    train(wrapped, [mine(step, rank) for step in range(2, 4)], optimizer)
    return {"state": Tiny.whole_state(model)}


def run_stepped_before(rank):
    """Steps of one process each, alike, then DDP."""
    model = adapted()
    optimizer = Tiny.adamw(model)
    train(model, [Tiny.batch(4, 6, seed=50)], optimizer)
    train(DistributedDataParallel(model), [mine(1, rank)], optimizer)
    return {"state": Tiny.whole_state(model), "shared": all(t.is_shared for t in Tiny.tables(model))}


def run_left(rank):
    """DDP, then each rank by itself, then DDP again."""
    model = adapted()
    wrapped, optimizer = DistributedDataParallel(model), Tiny.adamw(model)
    train(wrapped, [mine(0, rank)], optimizer)
    total = model.base_model.ranks.node.sum
    shares = [weakref.ref(memory) for memory in (Tiny.tables(model)[0].node._memory, *total._means)]
    held = all(memory() is not None for memory in shares)
    train(model, [mine(1, rank)], optimizer)
    model(input_ids=mine(1, rank))  # outside of DDP, and no table is shared any more
    gc.collect()
    released = held and not any(memory() is not None for memory in shares)
    alone, shared = Tiny.whole_state(model), any(t.is_shared for t in Tiny.tables(model))
    torch.distributed.barrier()
    train(wrapped, [mine(2, rank)], optimizer)
    shared_again = all(t.is_shared for t in Tiny.tables(model))
    rows = Tiny.state(model)
    return {"alone": alone, "shared": shared, "again": shared_again, "rows": rows, "released": released}


def run_uneven(rank):
    """The first rank makes forward passes with a graph that the other one does not make, and waits for nobody in them;
    it also writes rows, first of all tables and then, between backward and step, of one.
    """
    model = adapted()
    wrapped, optimizer = DistributedDataParallel(model, broadcast_buffers=False), Tiny.adamw(model)
    train(wrapped, [mine(step, rank) for step in range(2)], optimizer)  # DDP itself makes its buckets in the second
    means = []
    for step in range(2, 5):
        if rank == 0:
            if step == 3:
                for table in Tiny.tables(model):
                    table.leave_node()
            wrapped(input_ids=mine(9, rank))
        torch.distributed.barrier()  # the other rank comes once the pass is through
        wrapped(input_ids=mine(step, rank), labels=mine(step, rank)).loss.backward()
        means.append([table.rows.grad.to_dense() for table in Tiny.tables(model)])
        torch.nn.utils.clip_grad_norm_(Tiny.trainable(model), 0.05)
        if step == 4 and rank == 0:
            Tiny.tables(model)[0].rows.data.norm()
        optimizer.step()
        optimizer.zero_grad()
        shared = [t.is_shared for t in Tiny.tables(model)]
    return {"state": Tiny.whole_state(model), "shared": shared, "means": means}


def run_cast(rank):
    """What is read is cast in the middle of a run, on all ranks."""
    model = adapted(dtype=torch.float32)
    wrapped, optimizer = DistributedDataParallel(model), Tiny.adamw(model)
    train(wrapped, [mine(0, rank)], optimizer)
    for table in Tiny.tables(model):
        table.to(torch.bfloat16)
    train(wrapped, [mine(1, rank)], optimizer)
    tables = Tiny.tables(model)
    reads = []
    for table in tables:
        with table.reading() as read:
            reads.append(torch.equal(read, table.masters.to(torch.bfloat16)))
    return {"state": Tiny.whole_state(model), "shared": all(t.is_shared for t in tables), "reads": all(reads)}


def run_scaled(rank, overflow, dtype=torch.float64):
    """GradScaler; one rank's loss overflows in the second step."""
    model = adapted(dtype=dtype)
    wrapped, optimizer = DistributedDataParallel(model), Tiny.adamw(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if overflow is not None else None
    for step in range(3):
        batch = mine(step, rank)
        loss = wrapped(input_ids=batch, labels=batch).loss
        if overflow and step == 1:
            loss = loss * (float("inf") if rank == 1 else 1.0)
        if scaler is None:
            loss.backward()
        else:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(Tiny.trainable(model), 0.05)
        optimizer.step() if scaler is None else scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
        optimizer.zero_grad()
    return {"state": Tiny.whole_state(model), "counts": Tiny.most_touches(model)}


def tasks(rank, folder):
    """Name -> what a rank does."""
    found = {
        f"tables, {name}{', clipped' * clip}{', blocks' * bool(block)}": (
            lambda name=name, clip=clip, block=block: run_tables(rank, name, clip, block)
        )
        for name, clip, block in [
            *((name, False, None) for name in DTYPES),
            ("float32", True, None),
            ("float32", True, 64),
        ]
    }
    return found | {
        "memory": lambda: run_memory(rank, folder),
        "written": lambda: run_written(rank),
        "delayed": lambda: run_delayed(rank),
        "delayed, engine": lambda: run_delayed(rank, delay=2e-3, retrieval="device-rows"),
        **{f"{name}, delayed": partial(run_delayed, rank, 2, delay=2e-3, **fields) for name, fields in READERS.items()},
        "zero copy": lambda: run_zero_copy(rank, True),
        "no zero copy": lambda: run_zero_copy(rank, False),
        "kept state": lambda: run_kept_state(rank),
        "saved": lambda: run_saved(rank, folder),
        "stepped before": lambda: run_stepped_before(rank),
        "left": lambda: run_left(rank),
        "uneven": lambda: run_uneven(rank),
        "cast": lambda: run_cast(rank),
        "scaled": lambda: run_scaled(rank, False),
        "overflow": lambda: run_scaled(rank, True, torch.float32),
        "unscaled": lambda: run_scaled(rank, None),
    }


def apart(task):
    """A task's result with a copy of the rows for each rank."""
    os.environ[VARIABLE] = "0"
    try:
        return task()
    finally:
        del os.environ[VARIABLE]
