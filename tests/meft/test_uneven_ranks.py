"""Ranks with other numbers of batches in `DistributedDataParallel.join()` end equal to one process, and go on so.

The processes are those of `test_ddp.py` and `test_nodes.py`; what they do is in `tests/support/uneven_tasks.py`.
"""

import threading
from functools import cache

import pytest
import torch

import meft
from meft.gradient.row_gradient import RowGradient
from meft.optim.node import Node
from meft.table.update_queue import UpdateQueue
from tests.meft import test_ddp, test_nodes
from tests.meft.test_node_rows import both, joined
from tests.support import uneven_tasks as tasks
from tests.support.processes import once, result_of, run_ranks, saved_by_ranks
from tests.support.tiny_meft import Tiny
from tests.support.training import assert_close

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(request):
    return saved_by_ranks(once(request, "ranks_of_meft", lambda folder: run_ranks(test_ddp.__file__, folder)))


def check_tables(found, world, name, epochs, of_present):
    """Bit for bit, since all sums are exact."""
    states, norms = tasks.tables_as_one_process(world, name, epochs, of_present)
    for rank, entry in enumerate(found):
        for state, expected in zip(entry["states"], states, strict=True):
            Tiny.assert_equal(state, expected)
        own = [counts[rank] for counts in epochs] + [1]
        assert entry["norms"] == [norm for n, of_epoch in zip(own, norms, strict=True) for norm in of_epoch[:n]]
        assert entry["kept"]  # a state dict that is kept does not change with the steps of others


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize("number", range(len(tasks.TABLES)))
def test_rows_moments_and_counts_are_those_of_one_process_bit_for_bit(ranks, number, shared):
    found = result_of(ranks, f"{'' if shared else 'apart, '}uneven tables {number}")
    check_tables(found, 2, *tasks.TABLES[number])
    assert all(entry["shared"] == [shared] * 3 for entry in found)


@pytest.mark.parametrize("case", tasks.NODES, ids=str)
def test_a_node_all_of_whose_ranks_have_no_batch_gets_what_the_others_have(request, case):
    folder = once(request, "ranks_of_two_nodes", test_nodes.run_nodes)
    found = test_nodes.of_ranks(folder, ("uneven", *map(str, case)))
    check_tables(found, test_nodes.WORLD, *case[1:])
    assert all(all(entry["shared"]) for entry in found)


one_process = cache(tasks.model_as_one_process)


@pytest.mark.parametrize("name", [*tasks.MODELS, "in place, apart", "in backward, apart"])
def test_ranks_are_one_process_with_the_mean_over_all_or_over_those_that_go_on(ranks, name):
    name, _, apart = name.partition(", ")
    found = result_of(ranks, f"{'apart, ' if apart else ''}uneven, {name}")
    fields = {key: value for key, value in tasks.MODELS[name].items() if key in ("micro", "make")}
    expected = one_process(of_present=name == "of present", **fields)
    epochs = 1 if name == "LoRA" else 3  # torch leaves old moments to ranks that had fewer batches
    for first, second, whole in list(zip(*(entry["states"] for entry in found), expected, strict=True))[:epochs]:
        Tiny.assert_equal(first, second)
        assert_close(first, whole)
    assert [entry["followed"] for entry in found] == [name != "LoRA"] * 2


def test_the_two_means_differ():
    with pytest.raises(AssertionError):
        assert_close(one_process(of_present=True)[0], one_process(of_present=False)[0])


def test_rows_that_are_written_by_a_rank_that_goes_on_are_those_of_all(ranks):
    first, second = result_of(ranks, "uneven, written")
    Tiny.assert_equal(first["state"], second["state"])
    assert_close(first["state"], tasks.written_as_one_process())
    for entry in (first, second):
        assert not any(entry["shared"])  # until the next forward pass
        assert all(entry["again"])


def test_an_early_end_is_joins_own_error(ranks):
    first, second = result_of(ranks, "uneven, early")
    assert first["error"] == "Rank 0 exhausted all inputs."
    assert second["error"] == "Detected at least one rank that exhausted inputs. Throwing across all ranks."
    Tiny.assert_equal(first["state"], second["state"])


def test_a_context_that_leaves_out_the_rows_is_refused(ranks):
    for errors in result_of(ranks, "uneven, unknown"):
        made_before, copied = errors
        assert "leaves out MEFT adapters that are added after its DistributedDataParallel was made" in made_before
        assert "join() of a copy of a DistributedDataParallel leaves out its ASLoRA or MEFT adapter" in copied


def test_the_others_make_the_steps_of_all_rows_and_wait_for_nobody_else():
    (first,), (second,) = joined()
    for table in (first, second):
        table.node.ranks.stepping = [1]
    assert second.node.part(7) == slice(0, 7)
    with torch.no_grad(), second.node.turn(second.moments_in(tasks.node_tasks.optimizer_of([second]))):
        pass
    assert second.node.steps == 1


def test_a_step_that_is_queued_is_one_of_the_ranks_that_were_there():
    tables = joined()
    late = tables[0][0].update_masters

    def update_late(write, **rows):
        threading.Event().wait(0.2)
        late(write, **rows)

    tables[0][0].update_masters = update_late

    def run(rank):
        (table,) = tables[rank]
        table.updates = UpdateQueue()
        optimizer = meft.RowAdamW([table.rows], lr=0.5)
        table.rows.grad = RowGradient(torch.arange(8), torch.ones(8, 4), table.rows)
        optimizer.step()
        node = Node.__new__(Node)
        node.tables, node.members, node.ranks = [table], [0, 1], table.node.ranks
        node.step_among([1])
        return table.node.steps, table.node.ranks.stepping

    assert both(lambda: run(0), lambda: run(1)) == [(1, [1])] * 2
