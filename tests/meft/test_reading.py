"""Rows that are held still while another thread steps them: nobody waits for what needs the lock that they hold."""

import threading

import pytest
import torch

from meft import RowAdamW
from meft.table.shared_rows import Reading
from meft.table.update_queue import UpdateQueue


class Lock:
    """A table's lock; the first time that it is taken another thread begins a step, whose updates are queued."""

    def __init__(self, inner, step):
        self.inner, self.step = inner, step

    def acquire(self, *args):
        taken, step, self.step = self.inner.acquire(*args), self.step, None
        if step is not None:
            thread = threading.Thread(target=step)
            thread.start()
            thread.join()
        return taken

    def release(self):
        self.inner.release()

    def _is_owned(self):
        return self.inner._is_owned()

    def __enter__(self):
        return self.acquire()

    def __exit__(self, *_):
        self.release()


@pytest.fixture
def tables(tiny):
    """Keys and values whose updates wait in one queue as soon as the keys' lock is taken."""
    keys, values = tiny.tables(tiny.adapted(1, torch.float32))
    optimizer = RowAdamW([keys.rows, values.rows], lr=0.1)

    def step():
        for table in (keys, values):
            table.rows.grad = torch.ones(table.rows.shape)
        optimizer.step()

    keys.track_dirty_rows()
    step()
    keys.updates = values.updates = UpdateQueue()
    keys.lock = Lock(keys.lock, step)
    return keys, values


def both(keys, values):
    with Reading((keys, values)) as read:
        return [rows.clone() for rows in read]


def dirty(keys, values):
    with keys.reading() as read:
        keys.take_dirty_rows()
        return [read.clone()]


def state(keys, values):
    with keys.reading() as read:
        assert keys.state == keys.state
        return [read.clone()]


def by_the_parameter(keys, values):
    with keys.reading():
        return [keys.rows.detach().clone()]


@pytest.mark.parametrize("read", [both, dirty, state, by_the_parameter])
def test_a_reader_does_not_wait_for_an_update_that_needs_what_it_holds(tables, read):
    before, found = [table.masters.clone() for table in tables], []
    reader = threading.Thread(target=lambda: found.extend(read(*tables)), daemon=True)
    reader.start()
    reader.join(timeout=20)
    assert not reader.is_alive()
    for rows, was, table in zip(found, before, tables, strict=False):
        assert torch.equal(rows, was)  # as they were when they were taken
        table.synchronize()
        assert not torch.equal(table.masters, was)
