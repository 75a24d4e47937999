"""Four processes on what they take for two machines; then one of them is killed in the middle of a step.

They run this file as a script.
"""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from meft.gradient.node_sum import NodeSum, SumPlaces
from meft.optim.node import Node
from meft.table.node_rows import NodeRows
from meft.transport import shared_memory
from meft.transport.node_ranks import NodeRanks
from meft.transport.shared_memory import Layout, SharedMemory
from tests.support import node_tasks, uneven_tasks
from tests.support.processes import once, run_together
from tests.support.tiny_meft import Tiny

pytestmark = pytest.mark.slow
WORLD, TIMEOUT = 4, 30  # seconds
NODES = {"two and two": [0, 0, 1, 1], "three and one": [0, 0, 0, 1]}  # of each rank its machine
RUNS = [("two and two", name, False) for name in node_tasks.DTYPES]
RUNS += [("two and two", "float32", True), ("three and one", "float32", True)]


def killed_in_a_step(rank, folder):
    """How the others end, after a checkpoint: their error, after how many seconds, and what saving says then."""
    tables = node_tasks.tables_of(*node_tasks.DTYPES["float32"], seed=0)
    node, optimizer = Node.join(tables, torch.distributed.group.WORLD), node_tasks.optimizer_of(tables)
    for step in range(3):
        began = time.monotonic()
        try:
            node_tasks.average(tables, node, step, rank)
        except RuntimeError as error:  # on another node, of which no rank has ended
            return str(error), time.monotonic() - began, "none"
        if step == 1 and rank == 0:
            kept = {"rows": [table.state_dict() for table in tables], "optimizer": optimizer.state_dict()}
            torch.save(kept, folder / "checkpoint.pt")
            torch.save(node_tasks.state_of(tables), folder / "then.pt")
        if step == 1 and rank == 1:  # it has entered the step of all tables, and does no part of it
            NodeRows.turn = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        began = time.monotonic()
        try:
            optimizer.step()
        except RuntimeError as error:
            seconds, saving = time.monotonic() - began, "none"
            try:
                tables[0].state_dict()
            except RuntimeError as second:
                saving = str(second)
            return str(error), seconds, saving
    return "none", 0.0, "none"


def run(rank, nodes, name, clip):
    """A run on such machines, and bytes of each reduction over them."""
    shared_memory.machine_of_process = lambda: f"machine {NODES[nodes][rank]}"
    reduced, over_nodes = [], NodeSum._over_nodes

    def noted(self, parts, op):
        before = self.bytes_between_nodes
        over_nodes(self, parts, op)
        reduced.append(self.bytes_between_nodes - before)

    NodeSum._over_nodes = noted
    try:
        return node_tasks.run_tables(rank, name, clip) | {"reduced": reduced}
    finally:
        NodeSum._over_nodes = over_nodes


def run_uneven(rank, nodes, *case):
    shared_memory.machine_of_process = lambda: f"machine {NODES[nodes][rank]}"
    return uneven_tasks.run_tables(rank, *case)


def work(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD, timeout=timedelta(seconds=TIMEOUT)
    )
    made, new_group = [], torch.distributed.new_group
    torch.distributed.new_group = lambda ranks, **fields: (made.append(ranks), new_group(ranks, **fields))[1]
    found = {case: run(rank, *case) for case in RUNS} | {"groups": list(made)}
    found |= {("uneven", *map(str, case)): run_uneven(rank, *case) for case in uneven_tasks.NODES}
    torch.save(found, folder / f"rank{rank}.pt")
    torch.save(killed_in_a_step(rank, folder), folder / f"killed{rank}.pt")
    memory = SharedMemory.create(4096)
    ranks = NodeRanks(0, [os.getpid(), os.getppid()], memory.numbers(0, 8), TIMEOUT)
    os.kept = memory, ranks  # until the interpreter's end


def run_nodes(folder):
    """The results of all processes, in a folder."""
    ranks = [((rank, folder), folder / f"rank{rank}.log") for rank in range(WORLD)]
    ends = [0, -signal.SIGKILL, 0, 0]
    run_together(Path(__file__).read_text(encoding="utf-8"), ranks, 120, __file__, ends)
    said = [output.read_text() for _, output in ranks]
    assert not any("Exception ignored" in text for text in said)  # at the interpreter's end


@pytest.fixture(scope="module")
def folder(request):
    return once(request, "ranks_of_two_nodes", run_nodes)


def of_ranks(folder, case):
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False)[case] for rank in range(WORLD)]


@pytest.mark.parametrize("case", RUNS, ids=str)
def test_two_nodes_are_one_process(folder, case):
    """Norms of the gradients, by which they are clipped, have the same bits on all nodes."""
    expected, norms = node_tasks.as_one_process(WORLD, *case[1:])
    for entry in of_ranks(folder, case):
        Tiny.assert_equal(entry["state"], expected)
        assert entry["norms"] == norms


@pytest.mark.parametrize("case", RUNS, ids=str)
def test_each_rank_reduces_its_share_over_nodes_in_one_message_a_block(folder, case):
    nodes, name, _ = case
    size = torch.promote_types(node_tasks.DTYPES[name][0], torch.float32).itemsize
    shares = min(NODES[nodes].count(node) for node in (0, 1))
    masks = sum(r + 1 for r, _ in node_tasks.SHAPES) + 1  # and the answer to a question
    for rank, entry in enumerate(of_ranks(folder, case)):
        number = rank - NODES[nodes].index(NODES[nodes][rank])  # on its node
        expected = []
        for step in range(node_tasks.STEPS):
            rows = 0
            for table, (_, d) in enumerate(node_tasks.SHAPES):
                given = [node_tasks.gradient_of(step, k, table) for k in range(WORLD)]
                union = len(torch.cat([g[0] for g in given if g is not None]).unique())
                rows += size * d * (union * (number + 1) // shares - union * number // shares)
            expected += [masks * (number + 1) // shares - masks * number // shares, rows]
        assert entry["reduced"] == (expected if number < shares else [0] * len(expected))
        assert entry["between nodes"] == sum(entry["reduced"])


def test_a_group_of_ranks_of_several_nodes_is_made_once(folder):
    """For all runs of the same ranks: each time that rows are shared again."""
    assert of_ranks(folder, "groups") == [[[0, 2], [0, 3]], [[1, 3]], [[0, 2]], [[1, 3], [0, 3]]]


def test_a_rank_that_is_killed_in_a_step_ends_the_others_at_once(folder):
    for rank in (0, 2):
        error, seconds, saving = torch.load(folder / f"killed{rank}.pt")
        assert error.startswith("Rank 1 of this node (process ")
        assert "has ended: see its own messages, and start all ranks again from the last checkpoint" in error
        assert seconds < TIMEOUT / 2
        assert saving == error
    assert torch.load(folder / "killed3.pt")[0] != "none"


def test_the_checkpoint_before_it_is_whole(folder):
    saved = torch.load(folder / "checkpoint.pt")
    tables = node_tasks.tables_of(*node_tasks.DTYPES["float32"], seed=5)
    for table, state in zip(tables, saved["rows"], strict=True):
        table.load_state_dict(state)
    optimizer = node_tasks.optimizer_of(tables)
    optimizer.load_state_dict(saved["optimizer"])
    for table in tables:
        table.moments_in(optimizer)
    Tiny.assert_equal(node_tasks.state_of(tables), torch.load(folder / "then.pt"))


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))


def test_nodes_of_other_sizes_cut_the_same_blocks():
    forms = [(4096, 64, torch.float32)] * 2
    one, three = (SumPlaces.plan(Layout(), forms, ranks, 3) for ranks in (1, 3))
    assert one.block_bytes == three.block_bytes
