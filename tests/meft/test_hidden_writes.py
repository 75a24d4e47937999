"""Writes into shared rows of which torch tells nobody: they stay in the process that makes them, which then goes on
with rows of its own, as after any other write.
"""

import ctypes
import os
import threading
from functools import partial

import pytest
import torch
from torch import distributed

import meft
from meft.gradient.row_gradient import RowGradient
from meft.table.update_queue import UpdateQueue
from meft.transport import private_view
from meft.transport.shared_memory import SharedMemory
from peft_bridge.torch_private import without_torch_function
from tests.meft.test_node_rows import alone, both, has, joined, ones, stepped, whole  # noqa: F401

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only Linux has memory without a name")


def by_address(rows):
    values = whole(2)
    ctypes.memmove(rows.data_ptr(), values.data_ptr(), rows.nbytes)


def disabled(rows):
    with without_torch_function():
        rows.mul_(2)


@torch.library.custom_op("meft_tests::double", mutates_args=["rows"])
def double(rows: torch.Tensor) -> None:
    by_address(rows)


HIDDEN = {
    "address": by_address,
    "address of a view": lambda rows: by_address(rows[:]),
    "disabled": disabled,
    "operator": double,
    "all_gather": lambda rows: distributed.all_gather([rows], whole(2)),
    "foreign thread": lambda rows: both(lambda: by_address(rows), lambda: None),
}


@pytest.fixture(params=["scan", "entries"])
def kernel(request, monkeypatch):
    """Systems that look for written pages themselves, and those that say how each page is."""
    monkeypatch.setattr(private_view, "_SCAN", private_view._SCAN if request.param == "scan" else 0)


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", HIDDEN)
def test_a_hidden_write_reaches_what_this_rank_reads_and_no_other_rank(alone, way, compute_dtype):  # noqa: F811
    (first,), (second,) = joined(compute_dtype=compute_dtype)
    with torch.no_grad():
        HIDDEN[way](first.rows)
    assert bool((first.rows == 2).all())
    assert has(first, 2)
    assert not first.is_shared
    assert has(second, 1)
    assert second.is_shared


def test_rows_that_were_only_read_stay_shared(kernel):
    (first,), _ = joined()
    for _ in range(2):
        assert first.rows.sum().item() == 32
        first.state_dict()["rows"].clone()
        assert has(first, 1)
        assert first.is_shared


def double_moments(tables):
    for table in tables:
        if table.moments is not None:
            table.moments.exp_avg.mul_(2)


def write_rows(tables):
    for table in tables:
        by_address(table.rows[3])  # whose page has other rows too
        table.note_change()  # as `rows_changed` does, for what is read in another dtype


@pytest.mark.parametrize("write", [write_rows, double_moments])
def test_ranks_that_all_make_a_hidden_write_are_as_one_that_makes_it(kernel, write):
    """Between gradient and step, and after the step: other rows of its page have the step of each rank."""
    ranks, results = joined(), []

    def run(tables):
        optimizer, _ = stepped(tables, write)
        write(tables)
        with torch.no_grad():
            tables[0].rows.grad.mul_(2)
        optimizer.step()
        with tables[0].reading() as read:
            return [read.clone(), tables[0].rows.detach().clone(), *tables[0].moments.clone().tensors().values()]

    expected = run([ones()])
    results = both(lambda: run(ranks[0]), lambda: run(ranks[1]))
    for found in results:
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_hidden_write_in_the_middle_of_a_step_ends_all_ranks():
    (first,), (second,) = joined()
    inner = first.step

    def step(*args, **kwargs):
        inner(*args, **kwargs)
        by_address(first.rows[3])

    first.step = step

    def told(table, match):
        with pytest.raises(RuntimeError, match=match):
            stepped([table])
        return True

    assert all(both(partial(told, first, "in the middle of an optimizer"), partial(told, second, "has failed")))


def test_a_hidden_write_while_another_rank_is_late_in_a_step_ends_all_ranks():
    """A page that is copied then has rows of which the late rank has not made the step. Updates are queued, so that the
    optimizer's step returns before.
    """
    (first,), (second,) = joined()
    first.updates, second.updates = UpdateQueue(), UpdateQueue()
    inner, may_go_on = second.step, threading.Event()
    address, two = first.rows[3].data_ptr(), whole(2)

    def late(*args, **kwargs):
        assert may_go_on.wait(10)
        inner(*args, **kwargs)

    second.step = late
    optimizers = [meft.RowAdamW([table.rows], lr=0.5) for table in (first, second)]
    for table, optimizer in zip((first, second), optimizers, strict=True):
        table.rows.grad = RowGradient(torch.arange(8), torch.ones(8, 4), table.rows)
        optimizer.step()
    first._last.wait()
    ctypes.memmove(address, two.data_ptr(), 16)
    may_go_on.set()
    with pytest.raises(RuntimeError, match="in the middle of an optimizer step"):
        first.synchronize()
    optimizers[1].step()
    with pytest.raises(RuntimeError, match="has failed"):
        second.synchronize()


def test_what_is_written_stays_here_and_is_found_page_by_page(kernel):
    size = 4 * 4096
    memory = SharedMemory.create(size, users=True)
    view = memory.private
    shared, own = (memory.tensor(0, (size,), torch.uint8, private=private) for private in (False, True))
    shared.fill_(3)
    assert int(own.sum()) == 3 * size
    assert not view.written(0, size)
    own[4096] = 7
    assert [view.written(page * 4096, 4096) for page in range(4)] == [False, True, False, False]
    assert int(shared[4096]) == 3
    shared.fill_(4)
    assert own[[0, 4096, 4097, 8192]].tolist() == [4, 7, 3, 4]
    view.forget(0, size)
    assert not view.written(0, size)
    assert int(own.sum()) == 4 * size


def test_where_the_system_does_not_tell_of_writes_there_is_no_such_memory(monkeypatch):
    monkeypatch.setattr(private_view, "_SCAN", 0)
    monkeypatch.setattr(private_view.os, "pread", lambda *_: b"")
    with pytest.raises(OSError, match="which pages were written"):
        SharedMemory.create(4096, users=True)
