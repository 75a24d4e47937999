"""Sums of row gradients with room for rows to come, against a whole matrix."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meft.gradient.host.accumulator import Pending, RowSums, whole_of
from meft.gradient.row_gradient import RowGradient

R, D = 12, 3
ROWS = st.sets(st.integers(0, R - 1)).map(lambda rows: torch.tensor(sorted(rows), dtype=torch.int64))


def landed(rows, seed):
    values = torch.randint(-8, 9, (len(rows), D), generator=torch.Generator().manual_seed(seed))
    return rows, values.to(torch.float32)


def dense(parts):
    whole = torch.zeros(R, D)
    for rows, values in parts:
        whole[rows] += values
    return whole


@given(st.lists(ROWS, min_size=1, max_size=6))
def test_any_micro_batches(batches):
    parts = [landed(rows, seed) for seed, rows in enumerate(batches)]
    first = (parts[0][0], parts[0][1].clone())
    sums = RowSums(first, R)
    for part in parts[1:]:
        assert sums.add(part) is sums
    rows, values = sums.whole()
    assert rows.tolist() == sorted(set(torch.cat(batches).tolist()))
    assert torch.equal(dense([(rows, values)]), dense(parts))
    assert whole_of(sums)[1].shape == (len(rows), D)


def test_rows_that_are_there_take_no_new_memory():
    rows, values = landed(torch.arange(R), 0)
    sums = RowSums((rows, values), R)
    sums.add(landed(torch.tensor([1, 5]), 1)).add(landed(torch.tensor([0]), 2))
    assert sums.whole()[1].data_ptr() == values.data_ptr()


def test_memory_grows_by_twos_up_to_the_table():
    sums = RowSums(landed(torch.tensor([0]), 0), R)
    sizes = {len(sums.add(landed(torch.tensor([row]), row))._values) for row in range(1, R)}
    assert sizes == {2, 4, 8, R}


@pytest.mark.parametrize("stored", [False, True])
def test_pending_gradients_are_added_in_their_order(stored):
    table = torch.zeros(R, D)
    parts = [landed(torch.tensor(rows), seed) for seed, rows in enumerate(([1, 4], [0, 4, 9], [1, 9], [11]))]
    with ThreadPoolExecutor(1) as thread:
        total = None
        for rows, values in parts:
            future = thread.submit(lambda rows=rows, values=values: (rows, values.clone()))
            gradient = RowGradient.arriving(Pending(future, thread), table)
            if total is None:
                total = gradient
            else:
                total += gradient
            if stored:
                total.stored()
    assert torch.equal(total.to_dense(), dense(parts))
    assert total.rows.tolist() == [0, 1, 4, 9, 11]
