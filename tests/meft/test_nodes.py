"""Three processes on what they take for two machines; then one of them is killed in the middle of a step.

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

from meft.table.node_rows import NodeRows
from meft.transport import shared_memory
from meft.transport.node_ranks import NodeRanks
from meft.transport.shared_memory import SharedMemory
from tests.support import node_tasks
from tests.support.processes import once, run_together
from tests.support.tiny_meft import Tiny

pytestmark = pytest.mark.slow
WORLD, TIMEOUT = 3, 30  # seconds


def killed_in_a_step(rank):
    """How the others end: their error, and after how many seconds."""
    turn, began = NodeRows.turn, []

    def die(self, entry):
        began.append(time.monotonic())
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return turn(self, entry)

    NodeRows.turn = die
    try:
        node_tasks.run_tables(rank, "float32", False)
    except RuntimeError as error:
        return str(error), time.monotonic() - began[0]
    return "none", 0.0


def work(rank, folder):
    torch.set_num_threads(1)
    shared_memory.machine_of_process = lambda: "first machine" if rank < 2 else "second machine"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD, timeout=timedelta(seconds=TIMEOUT)
    )
    results = {name: node_tasks.run_tables(rank, name, False) for name in node_tasks.DTYPES}
    torch.save(results, folder / f"rank{rank}.pt")
    torch.save(killed_in_a_step(rank), folder / f"killed{rank}.pt")
    memory = SharedMemory.create(4096)
    ranks = NodeRanks(0, [os.getpid(), os.getppid()], memory.numbers(0, 8), TIMEOUT)
    os.kept = memory, ranks  # until the interpreter's end


@pytest.fixture(scope="module")
def folder(request):
    def run(folder):
        ranks = [((rank, folder), folder / f"rank{rank}.log") for rank in range(WORLD)]
        ends = [0, -signal.SIGKILL, 0]
        run_together(Path(__file__).read_text(encoding="utf-8"), ranks, 120, __file__, ends)
        said = [output.read_text() for _, output in ranks]
        assert not any("Exception ignored" in text for text in said)  # at the interpreter's end

    return once(request, "ranks_of_two_nodes", run)


@pytest.mark.parametrize("name", node_tasks.DTYPES)
def test_two_nodes_are_one_process(folder, name):
    expected, _ = node_tasks.as_one_process(WORLD, name, False)
    entries = [torch.load(folder / f"rank{rank}.pt", weights_only=False)[name] for rank in range(WORLD)]
    unions = masks = 0
    for number, (r, d) in enumerate(node_tasks.SHAPES):
        for step in range(node_tasks.STEPS):
            given = [node_tasks.gradient_of(step, rank, number) for rank in range(WORLD)]
            masks += r + 1
            size = torch.float64.itemsize if name == "float64" else torch.float32.itemsize
            unions += d * size * len(torch.cat([g[0] for g in given if g is not None]).unique())
    for rank, entry in enumerate(entries):
        Tiny.assert_equal(entry["state"], expected)
        of_first = masks + unions + node_tasks.STEPS  # and in each step the answer to a question
        assert entry["between nodes"] == (0 if rank == 1 else of_first)


def test_a_rank_that_is_killed_in_a_step_ends_the_others_at_once(folder):
    error, seconds = torch.load(folder / "killed0.pt")
    assert error.startswith("Rank 1 of this node (process ")
    assert "has ended: see its own messages, and start all ranks again from the last checkpoint" in error
    assert seconds < TIMEOUT / 2
    assert torch.load(folder / "killed2.pt")[0] != "none"


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
