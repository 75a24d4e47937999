"""The update of rows gives way to what the computation waits for: the drain of gradients, and picks."""

import os
import signal
import threading
from bisect import bisect
from collections.abc import Callable

import pytest
import torch

from adapter_kernels.topk import host_topk
from meft.gradient.host.drain import drain
from meft.table.row_step import RowState, StepRule, native_library, update_rows

ROWS, WIDTH, DRAINED = 20_000, 1024, 50_000
RULE = StepRule(1e-3)
TRIES, FEW = 12, ROWS // 4  # a busy machine may let the update go on before and after; else it does most of its rows

pytestmark = [
    pytest.mark.skipif(native_library() is None, reason="no C++ library: torch's own threads do this work"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture
def one_thread(monkeypatch):
    monkeypatch.setenv("ASLORA_MEFT_THREADS", "1")


class Beside:
    """A thread that updates all rows of a table of zeros."""

    def __init__(self) -> None:
        gradients = torch.ones(ROWS, WIDTH)
        self.state = RowState(*torch.zeros(3, ROWS, WIDTH), torch.zeros(ROWS, dtype=torch.int32))
        arguments = self.state, torch.arange(ROWS), gradients, RULE
        self.last = self.state.table.numpy()[:, -1]
        self.thread = threading.Thread(target=update_rows, args=arguments)

    def done(self) -> int:
        """Rows that are updated, but for the last pieces, as they are in ascending order: to count takes too long."""
        return bisect(range(ROWS), False, key=lambda row: not self.last[row])

    def rows_during(self, work: Callable[[], object]) -> int:
        """How many rows are updated while this thread does some work, which begins and ends within the update."""
        self.thread.start()
        while self.done() < 100:
            pass
        before = self.done()
        work()
        after = self.done()
        self.thread.join()
        torch.testing.assert_close(self.state.table, torch.full((ROWS, WIDTH), -1e-3), rtol=1e-5, atol=0)
        assert self.state.counts.eq(1).all()
        return after - before


def least_rows_during(work: Callable[[], object]) -> int:
    """The least of some tries."""
    found = ROWS
    for _ in range(TRIES):
        if (found := min(found, Beside().rows_during(work))) < FEW:
            break
    return found


def test_a_drain_goes_first():
    source, target = torch.randn(DRAINED, WIDTH), torch.empty(DRAINED, WIDTH)
    expected, found = drain(source, target).clone(), []

    assert least_rows_during(lambda: found.append(drain(source, target))) < FEW

    assert torch.equal(target, source)
    assert all(torch.equal(sums, expected) for sums in found)


def test_picks_go_first():
    if host_topk.native_library() is None:
        pytest.skip("no C++ library: torch picks")
    random, found = torch.Generator().manual_seed(0), []
    x, logits, keys = (torch.randn(shape, generator=random) for shape in ((256, 256), (256, 64), (64 * 256, 256)))

    def pick() -> None:
        found.append(host_topk.select_rows(x, logits, keys, 32, 8, True, None))

    pick()
    assert least_rows_during(pick) < FEW

    assert all(torch.equal(one, other) for again in found for one, other in zip(again, found[0], strict=True))


def test_a_fork_while_a_drain_is_under_way_leaves_no_update_waiting():
    source, target = torch.ones(DRAINED, WIDTH), torch.empty(DRAINED, WIDTH)
    draining = threading.Thread(target=drain, args=(source, target))
    draining.start()
    while not target[:16].count_nonzero():
        pass
    process = os.fork()
    if not process:
        signal.alarm(30)  # ends one that waits
        try:
            few = RowState(*torch.zeros(3, 64, 16), torch.zeros(64, dtype=torch.int32))
            update_rows(few, torch.arange(64), torch.ones(64, 16), RULE, native=True)
            os._exit(0 if few.table.count_nonzero() == few.table.numel() else 1)
        finally:
            os._exit(2)
    under_way = draining.is_alive()
    draining.join()
    assert os.waitpid(process, 0)[1] == 0
    assert under_way
    assert torch.equal(target, source)
