"""Ranks of one machine share one copy of the rows: they end equal to one process, whoever comes late.

The two processes are those of `test_ddp.py`; what they do is in `tests/support/node_tasks.py`.
"""

import pytest
import torch

from tests.meft import test_ddp
from tests.support import node_tasks
from tests.support.processes import once, result_of, run_ranks, saved_by_ranks
from tests.support.tiny_meft import Tiny
from tests.support.training import assert_close

pytestmark = pytest.mark.slow
TABLES = [
    *((name, False, "") for name in node_tasks.DTYPES),
    ("float32", True, ""),
    ("float32", True, ", blocks"),
]


@pytest.fixture(scope="module")
def folder(request):
    return once(request, "ranks_of_meft", lambda folder: run_ranks(test_ddp.__file__, folder))


@pytest.fixture(scope="module")
def ranks(folder):
    return saved_by_ranks(folder)


def equal(ranks, name, key="state"):
    first, second = result_of(ranks, name)
    Tiny.assert_equal(first[key], second[key])
    return first


@pytest.mark.parametrize(("name", "clip", "blocks"), TABLES)
def test_two_ranks_are_one_process_bit_for_bit_where_sums_are_exact(ranks, name, clip, blocks):
    expected, norms = node_tasks.as_one_process(2, name, clip)
    found = result_of(ranks, f"tables, {name}{', clipped' * clip}{blocks}")
    for entry in found:
        Tiny.assert_equal(entry["state"], expected)
        assert entry["norms"] == norms
        assert all(entry["shared"])
        assert entry["kept"]  # a gradient that is kept does not change with later steps
    for number, (r, _) in enumerate(node_tasks.SHAPES):
        unions = 0
        for step in range(node_tasks.STEPS):
            given = [node_tasks.gradient_of(step, rank, number) for rank in range(2)]
            unions += len(torch.cat([g[0] for g in given if g is not None]).unique())
        first, second = (entry["stepped"][number] for entry in found)
        assert first + second == unions  # each row once
        assert abs(first - second) <= node_tasks.STEPS
        assert unions < r * node_tasks.STEPS


@pytest.mark.parametrize("rank", [0, 1])
def test_bytes_between_ranks_are_masks_and_own_rows(ranks, rank):
    entry = result_of(ranks, "tables, float32")[rank]
    masks = node_tasks.STEPS * sum(r + 1 for r, _ in node_tasks.SHAPES)
    given = [(node_tasks.gradient_of(s, rank, n), d) for s in range(node_tasks.STEPS)
             for n, (_, d) in enumerate(node_tasks.SHAPES)]  # fmt: skip
    assert entry["bytes"] == masks + sum(4 * d * len(g[0]) for g, d in given if g is not None)
    assert entry["between nodes"] == 0


def test_barriers_are_of_a_step_and_not_of_a_table(ranks):
    """One after the masks, one a block, one at the end; two when sharing begins, two where means get other memory."""
    for entry in result_of(ranks, "tables, float32"):
        assert entry["barriers"] == 3 * node_tasks.STEPS + 2 + 2 * 2  # a mean is kept from one of the steps


@pytest.mark.parametrize("name", test_ddp.APART)
def test_one_copy_of_the_rows_or_one_a_rank_end_alike(ranks, name):
    apart = result_of(ranks, f"apart, {name}")
    for number, together in enumerate(result_of(ranks, name)):
        assert set(together) == set(apart[number])
        for key, value in together.items():
            if isinstance(value, dict):
                Tiny.assert_equal(value, apart[number][key])
            elif isinstance(value, torch.Tensor):
                assert torch.equal(value, apart[number][key])
            elif key == "logits":
                assert all(map(torch.equal, value, apart[number][key]))
            else:
                assert value == apart[number][key]


def test_rows_moments_and_copies_are_in_memory_without_a_name_and_written_by_one_rank(ranks):
    first, second = result_of(ranks, "memory")
    assert (first["wrote"], second["wrote"]) == (4, 0)
    for entry in (first, second):
        assert len(entry["shared"]) == 20
        assert all(entry["shared"])
        assert not any(entry["of copies"])
        assert entry["descriptors"] <= 7  # of sums, of tables for us and for users, and of four means


def test_a_write_of_the_user_counts_once_and_on_one_rank_alone(ranks):
    for entry in result_of(ranks, "written"):
        assert entry["found"] == dict.fromkeys(node_tasks.WRITES, True)
        assert entry["shared"]
    equal(ranks, "written")


@pytest.mark.parametrize("name", ["delayed", "delayed, engine"])
def test_nobody_writes_before_the_last_read_of_a_late_rank(ranks, name):
    entry = equal(ranks, name)
    model = node_tasks.adapted()
    optimizer, logits = Tiny.adamw(model), []
    for step in range(3):
        batch = Tiny.batch(4, 6, seed=50 + step)
        model(input_ids=batch, labels=batch).loss.backward()
        with torch.no_grad():
            logits.append(model(input_ids=node_tasks.mine(9, 0)).logits)
        optimizer.step()
        optimizer.zero_grad()
    assert_close(entry["state"], Tiny.whole_state(model))
    for found, expected in zip(result_of(ranks, name)[1]["logits"], logits, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_steps_on_the_device_give_the_same_bits(ranks):
    assert equal(ranks, "zero copy")["shared"]
    Tiny.assert_equal(equal(ranks, "zero copy")["state"], equal(ranks, "no zero copy")["state"])


def one_process(steps, model=None, optimizer=None):
    model = model or node_tasks.adapted()
    optimizer = optimizer or Tiny.adamw(model)
    node_tasks.train(model, [Tiny.batch(4, 6, seed=50 + step) for step in steps], optimizer)
    return Tiny.whole_state(model)


def test_a_state_that_was_kept_stays_and_can_be_gone_on_from(ranks):
    for entry in result_of(ranks, "kept state"):
        assert entry["same"]
        rows = [name for name in entry["first"] if "router" not in name]
        Tiny.assert_equal({n: entry["first"][n] for n in rows}, {n: entry["second"][n] for n in rows})
        assert entry["fresh"] == [1] * 4
    assert_close(equal(ranks, "kept state", "first")["first"], one_process(range(4)))
    equal(ranks, "kept state")


def test_a_run_of_two_ranks_goes_on_in_one_process(ranks, folder):
    expected = equal(ranks, "saved")["state"]
    for way in ("optimizer", "files"):
        saved = torch.load(folder / "resume.pt", weights_only=False)
        model = node_tasks.adapted(seed=5)
        model.get_base_model().load_state_dict(node_tasks.adapted().get_base_model().state_dict())
        model.load_state_dict(saved["model"], strict=False)
        optimizer = Tiny.adamw(model)
        optimizer.load_state_dict(saved["optimizer"])
        if way == "files":
            model.base_model.load_training_state(folder / "training_state", optimizer)
        assert_close(one_process(range(2, 4), model, optimizer), expected)


def test_moments_from_before_ddp_are_taken_along(ranks):
    assert equal(ranks, "stepped before")["shared"]
    assert_close(equal(ranks, "stepped before")["state"], one_process(range(2)))


def test_ranks_that_train_apart_after_ddp_get_rows_of_their_own(ranks):
    model = node_tasks.adapted()
    optimizer = Tiny.adamw(model)
    node_tasks.train(model, [Tiny.batch(4, 6, seed=50)], optimizer)
    node_tasks.train(model, [node_tasks.mine(1, 0)], optimizer)
    first, second = result_of(ranks, "left")
    assert_close(first["alone"], Tiny.whole_state(model))
    assert not first["shared"]
    assert not second["shared"]
    assert any(not torch.equal(first["alone"][name], second["alone"][name]) for name in first["alone"])
    assert first["again"]
    assert second["again"]
    assert first["released"]
    assert second["released"]
    rows = [name for name in first["rows"] if name.endswith(".rows")]
    Tiny.assert_equal({n: first["rows"][n] for n in rows}, {n: second["rows"][n] for n in rows})


def test_a_rank_alone_may_make_a_pass_or_write_what_the_others_have(ranks):
    entry = equal(ranks, "uneven")
    assert entry["shared"] == [False, True, True, True]
    assert_close(entry["state"], one_process(range(5)))
    for first, second in zip(*(found["means"] for found in result_of(ranks, "uneven")), strict=True):
        assert all(map(torch.equal, first, second))


def test_a_cast_in_the_middle_of_a_run(ranks):
    entry = equal(ranks, "cast")
    assert entry["shared"]
    assert entry["reads"]


def test_grad_scaler(ranks):
    assert_close(equal(ranks, "scaled")["state"], equal(ranks, "unscaled")["state"])
    assert max(equal(ranks, "overflow")["counts"]) == 2
    assert max(equal(ranks, "scaled")["counts"]) == 3
