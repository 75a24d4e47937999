"""Rows that two ranks share, both of them in this process: what one writes, the other does not get."""

import copy
import gc
import os
import threading
import time
import weakref
from functools import partial

import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F

import meft
from adapter_kernels.adamw.moment_layout import MODES
from meft.gradient.host import drain, mean
from meft.gradient.host.mean import RowsOfRanks
from meft.gradient.row_gradient import RowGradient
from meft.table.node_rows import NodePlaces, NodeRows
from meft.table.row_step import native_library
from meft.table.row_table import RowTable
from meft.table.update_queue import UpdateQueue
from meft.transport import node_ranks
from meft.transport.node_ranks import NodeRanks
from meft.transport.shared_memory import Layout, SharedMemory
from tests.support.processes import run_code

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only Linux has memory without a name")
SHAPE = (8, 4)


def ones(compute_dtype=torch.bfloat16, mode="float32", master=torch.float32):
    """A table of ones."""
    table = RowTable(SHAPE, master=master, compute_dtype=compute_dtype, on_host=True, pin=False, mode=mode)
    with torch.no_grad():
        table.rows.fill_(1.0)
    return table


def joined(tables=1, compute_dtype=torch.bfloat16, timeout=20.0, mode="float32", master=torch.float32):
    """Of each of two ranks its tables: rows of ones, of which both have one copy."""
    layout = Layout()
    numbers = layout.place(32 * 2)
    places = [NodePlaces.plan(layout, SHAPE, master, compute_dtype, 2, mode) for _ in range(tables)]
    memory = SharedMemory.create(layout.size, users=True)
    memories = [memory, SharedMemory.open(os.getpid(), memory.descriptor, layout.size, users=True)]
    ranks = [NodeRanks(rank, [os.getpid()] * 2, memory.numbers(numbers, 8), timeout) for rank in range(2)]
    found = []
    for rank, memory in zip(ranks, memories, strict=True):
        rank.summed = True
        found.append([])
        for number, place in enumerate(places):
            table = ones(compute_dtype, mode, master)
            own = table.take_up(NodeRows(rank, memory, place, number, tables))
            if rank.leads:
                table.write_shared(own)
            found[-1].append(table)
    for table in (*found[0], *found[1]):
        table.shared_rows_written()
    return found


def has(table, value):
    """Whether all masters are this value, and all that is read."""
    with table.reading() as read:
        return bool((table.masters == value).all()) and bool((read == value).all())


def whole(value):
    return torch.full(SHAPE, float(value))


def swapped(rows):
    """The parameter that has what the rows had."""
    other = nn.Parameter(whole(2))
    torch.utils.swap_tensors(rows, other)
    return other


def restored(rows):
    """Rows that were replaced, read, and replaced by what they had been; then written."""
    kept = rows.detach()
    rows.data = whole(7)
    assert has(rows.watch.table(), 7)
    rows.data = kept
    rows.mul_(2)


def view_of_replaced(rows):
    """A view of what the rows had is written, and the rows keep what they have."""
    kept = rows[:]
    rows.data = whole(2)
    kept.mul_(5)
    assert bool((kept == 5).all())


IDS = torch.arange(SHAPE[0])
WRITES = {
    "data": lambda rows: setattr(rows, "data", whole(2)),
    "set_": lambda rows: rows.set_(whole(2)),
    "swap_tensors": swapped,
    "swapped and written": lambda rows: swapped(rows).mul_(3),
    "vector_to_parameters": lambda rows: nn.utils.vector_to_parameters(whole(2).flatten(), [rows]),
    "restored": restored,
    "view of replaced": view_of_replaced,
    "as_subclass": lambda rows: rows.as_subclass(torch.Tensor).mul_(2),
    "as_subclass of a view": lambda rows: rows.detach().as_subclass(torch.Tensor).mul_(2),
    "copy": lambda rows: copy.copy(rows).mul_(2),
    "data of a view": lambda rows: rows[:].data.mul_(2),
    "inplace": lambda rows: F.threshold(rows, 5.0, 2.0, inplace=True),
    "max_norm": lambda rows: F.embedding(IDS, rows, max_norm=1.0),  # of rows of norm 2
    "overload": lambda rows: torch.ops.aten.mul_.Tensor(rows, whole(2)),
    "__imul__": lambda rows: rows.__imul__(2),
}


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WRITES)
def test_a_write_reaches_what_this_rank_reads_and_no_other_rank(way, compute_dtype):
    (first,), (second,) = joined(compute_dtype=compute_dtype)
    assert has(first, 1)
    assert has(second, 1)
    with torch.no_grad():
        WRITES[way](first.rows)
    if way == "max_norm":
        torch.testing.assert_close(first.masters, whole(0.5))
    else:
        assert has(first, 2)
    assert not first.is_shared
    assert second.is_shared
    assert has(second, 1)
    with torch.no_grad():
        first.rows.mul_(4)
    assert has(second, 1)


def test_what_is_swapped_out_after_a_read_is_not_the_other_ranks():
    (first,), (second,) = joined()
    other = swapped(first.rows)
    assert has(first, 2)
    with torch.no_grad():
        other.mul_(3)
        other.add_(1)
    assert bool((other == 4).all())
    assert has(second, 1)


@pytest.fixture
def alone():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("collective", [distributed.all_reduce, lambda rows: distributed.broadcast(rows, 0)])
@pytest.mark.parametrize("given", [lambda rows: rows, lambda rows: rows.data, lambda rows: rows.detach()])
def test_a_collective_gets_rows_of_this_rank_alone(alone, collective, given):
    (first,), (second,) = joined()
    with torch.no_grad():
        collective(given(first.rows))
    assert first.node is None
    assert second.is_shared


def test_reading_values_leaves_the_rows_shared():
    (first,), _ = joined()
    with torch.no_grad():
        assert int(first.rows[0, 0]) == float(first.rows.sum()) / 32 == 1
        assert len(list(first.rows)) == 8
        assert not (~(first.rows > 0)).any()
        assert first.rows.__rsub__(1).abs().max() == 0
        first.rows.requires_grad_(True)
        F.embedding(IDS, first.rows)
    first.state_dict()
    assert first.is_shared


def stepped(tables, write=lambda tables: None, delay=0.0):
    """A step of ones on half of the rows, then what all tables have; `write` comes between gradient and step."""
    optimizer = meft.RowAdamW([table.rows for table in tables], lr=0.5)
    for table in tables:
        table.rows.grad = RowGradient(torch.arange(0, 8, 2), torch.ones(4, 4), table.rows)
    threading.Event().wait(delay)
    with torch.no_grad():
        write(tables)
    optimizer.step()
    for table in tables:
        table.synchronize()
    return optimizer, [[table.masters.clone(), *table.moments.clone().tensors().values()] for table in tables]


def both(*calls):
    """What two ranks return, each in a thread."""
    results = [None, None]

    def run(rank):
        try:
            results[rank] = calls[rank]()
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_moments_of_each_mode_are_in_the_shared_memory(mode, master):
    """Each rank steps half of the rows; both then have what one process has."""
    ranks = joined(mode=mode, master=master)
    _, (expected,) = stepped([ones(mode=mode, master=master)])
    for _, (found,) in both(*(partial(stepped, tables) for tables in ranks)):
        assert [t.dtype for t in found] == [t.dtype for t in expected]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("tables", [1, 2, 3, 4, 6, 16])
def test_all_ranks_step_as_many_parts_of_tables_and_each_row_is_of_one_part(ranks, tables):
    layout = Layout()
    place = NodePlaces.plan(layout, SHAPE, torch.float32, torch.float32, ranks)
    memory = SharedMemory.create(layout.size, users=True)
    numbers = memoryview(bytearray(32 * ranks)).cast("q")
    parts = {rank: [] for rank in range(ranks)}
    for position in range(tables):
        rows = torch.zeros(7)
        for rank in range(ranks):
            of_rank = NodeRanks(rank, [os.getpid()] * ranks, numbers, 1.0)
            part = NodeRows(of_rank, memory, place, position, tables).part(7)
            rows[part] += 1
            parts[rank] += [part] * (part.stop > part.start)
        assert rows.tolist() == [1] * 7
    if ranks < 8:  # with eight ranks and seven rows a part may be empty
        assert len({len(of_rank) for of_rank in parts.values()}) == 1
    assert tables % ranks or all(part == slice(0, 7) for of_rank in parts.values() for part in of_rank)


def written(tables):
    tables[0].rows.mul_(2)


@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("writes", [(written, written), (written, lambda tables: None)], ids=["both", "one"])
def test_a_table_that_is_written_before_the_step_is_left_alone_by_itself(writes, queued):
    tables = joined(tables=3)
    for table in (*tables[0], *tables[1]):
        table.updates = UpdateQueue() if queued else None
    # The first rank has left one table before the second has come to any.
    found = both(lambda: stepped(tables[0], writes[0]), lambda: stepped(tables[1], writes[1], delay=0.1))
    for rank, (_, result) in enumerate(found):
        plain = [
            RowTable(SHAPE, master=torch.float32, compute_dtype=torch.bfloat16, on_host=True, pin=False)
            for _ in range(3)
        ]
        with torch.no_grad():
            for table in plain:
                table.rows.fill_(1.0)
        _, expected = stepped(plain, writes[rank])
        for number in range(3):
            assert all(map(torch.equal, result[number], expected[number])), (rank, number)
        assert [table.is_shared for table in tables[rank]] == [False, True, True]


@pytest.mark.parametrize("queued", [False, True])
def test_a_step_waits_for_the_other_ranks_once_for_all_tables(queued):
    tables, others_through = joined(tables=3), threading.Event()
    for table in (*tables[0], *tables[1]):
        table.updates = UpdateQueue() if queued else None
    late, last = tables[1][0].step, tables[0][2].step

    def step_late(*args, **kwargs):
        assert others_through.wait(10)  # the first rank is through with its parts of all tables
        late(*args, **kwargs)

    def step_last(*args, **kwargs):
        last(*args, **kwargs)
        others_through.set()

    tables[1][0].step, tables[0][2].step = step_late, step_last
    both(lambda: stepped(tables[0]), lambda: stepped(tables[1]))
    for first, second in zip(*tables, strict=True):
        assert first.is_shared
        assert torch.equal(first.masters, second.masters)
        assert first.node.steps == second.node.steps == 1


def test_rows_that_are_written_in_the_middle_of_a_step_end_all_ranks():
    (first,), (second,) = joined()

    def written_in_step():
        first.step = lambda *args, **kwargs: first.leave_node()
        with pytest.raises(RuntimeError, match="in the middle of an optimizer step"):
            stepped([first])
        return True

    def told():
        with pytest.raises(RuntimeError, match="has failed to update them"):
            stepped([second])
        return True

    assert both(written_in_step, told) == [True, True]


@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("when", ["before", "between"])
def test_a_rank_whose_gradient_is_missing_ends_the_others_at_once(monkeypatch, queued, when):
    """It is missing before the step, or between its beginning and the update of its table."""
    tables = joined(tables=2, timeout=20)
    for table in (*tables[0], *tables[1]):
        table.updates = UpdateQueue() if queued else None
    missing_at = {"before": 1, "between": 3}[when]
    asked, inner, the_gradient = [], RowGradient.to_multiply, []

    def to_multiply(gradient):
        if the_gradient and gradient is the_gradient[0]:
            asked.append(gradient)
            if len(asked) == missing_at:
                raise RuntimeError("it did not arrive")
        return inner(gradient)

    monkeypatch.setattr(RowGradient, "to_multiply", to_multiply)
    monkeypatch.setattr(RowGradient, "for_update", lambda gradient: gradient)

    def failing():
        with pytest.raises(RuntimeError, match="did not arrive"):
            stepped(tables[0], lambda of_rank: the_gradient.append(of_rank[1].rows.grad))
        return time.monotonic()

    def told():
        with pytest.raises(RuntimeError, match="has failed to update them"):
            stepped(tables[1])
        return time.monotonic()

    if when == "before":  # nobody has entered anything: this rank may go on, or end
        failing()
        assert not any(table.node.entered for table in tables[0])
        return
    began = time.monotonic()
    assert max(both(failing, told)) - began < 10


@pytest.mark.parametrize("width", [5, 37])
def test_the_mean_of_ranks_by_the_library_has_the_bits_of_torch(monkeypatch, width):
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(3, 24, generator=generator) < 0.5).to(torch.uint8)
    masks[:, 7] = 0  # a row of another node
    rows = torch.cat([masks.any(0).nonzero().flatten(), torch.tensor([7])]).sort().values
    values = torch.randn(3, len(rows), width, generator=generator)
    ranks, found = RowsOfRanks(masks, rows, list(values)), []
    for library in (native_library(), None):
        monkeypatch.setattr(mean, "native_library", lambda library=library: library)
        monkeypatch.setattr(drain, "native_library", lambda library=library: library)
        out = torch.full((len(rows), width), float("nan"))
        squared = [ranks.mean(part, 3, out[part]) for part in (slice(0, 9), slice(9, len(rows)))]
        assert sum(squared) == pytest.approx(float(out.double().square().sum()), rel=1e-12)
        found.append(out)
    assert torch.equal(*found)
    whole = torch.zeros(24, width)
    for rank in range(3):
        own = masks[rank].nonzero().flatten()
        whole.index_add_(0, own, values[rank, : len(own)])
    assert torch.equal(found[0], whole[rows] / 3)


@pytest.mark.parametrize("woken", [True, False])
def test_a_rank_that_waits_is_woken(monkeypatch, woken):
    """By the system, long before it would look by itself; or it looks by itself where the system cannot wake it."""
    monkeypatch.setattr(node_ranks, "_LIVE" if woken else "_FUTEX", 5.0 if woken else {})
    memory = SharedMemory.create(64)
    ranks = [NodeRanks(rank, [os.getpid()] * 2, memory.numbers(0, 8), 20.0) for rank in range(2)]

    def late():
        threading.Event().wait(0.1)
        ranks[1].barrier()

    began = time.monotonic()
    both(ranks[0].barrier, late)
    assert time.monotonic() - began < 3


def test_loading_with_steps_queued_waits_for_these_and_nobody_else():
    tables = joined(tables=2)
    state, late = {"rows": whole(3)}, tables[0][1].update_masters

    def update_late(write, **rows):
        threading.Event().wait(0.2)
        late(write, **rows)

    tables[0][1].update_masters = update_late

    def run(rank):
        for table in tables[rank]:
            table.updates = UpdateQueue()
        optimizer = meft.RowAdamW([table.rows for table in tables[rank]], lr=0.5)
        for table in tables[rank]:
            table.rows.grad = RowGradient(IDS, torch.ones(SHAPE), table.rows)
        threading.Event().wait(0.1 * rank)
        optimizer.step()
        for table in tables[rank]:
            table.load_state_dict(state)
        return [has(table, 3) and int(table.moments.counts.min()) == 1 for table in tables[rank]]

    assert both(lambda: run(0), lambda: run(1)) == [[True, True]] * 2


def test_the_memory_goes_when_all_ranks_have_left():
    for tables in joined(tables=2):
        memory = weakref.ref(tables[0].node._memory)
        for table in tables:
            assert memory() is not None
            table.leave_node()
        gc.collect()
        assert memory() is None


CHILD = """
import copy
from tests.meft.test_node_rows import joined
from tests.support.processes import print_ends_of_children
(table,), _ = joined()
print_ends_of_children((
    table.synchronize, lambda: table.version, lambda: table.rows.sum(), table.state_dict, lambda: copy.deepcopy(table),
    table.leave_node,
))
"""


@pytest.mark.slow
def test_a_child_gets_a_sentence():
    assert run_code(CHILD).split() == ["7"] * 6
