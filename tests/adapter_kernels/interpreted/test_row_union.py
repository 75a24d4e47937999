"""row_union's kernels against the oracle: exact, in poisoned memory."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapter_kernels import row_union, row_union_window
from tests.support.kernels import kernel_checks
from tests.support.kernels.kernel_checks import every_second_row, transposed
from tests.support.kernels.selection_checks import check_load, check_union, check_window, generator

kernel = partial(row_union, impl="triton")
window = partial(row_union_window, impl="triton")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("T", "K", "r"), [(1, 1, 1), (37, 64, 8464), (512, 4, 1025), (3, 2, 1024)])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_oracle(fenced, dtype, T, K, r, masked):
    ids = torch.randint(-1, r, (T, K), generator=generator(), dtype=dtype)
    valid = torch.rand(T, K, generator=generator(1)) < 0.7 if masked else None
    check_union(kernel, ids, r, valid)


def test_none_one_and_all_rows(fenced):
    check_union(kernel, torch.full((5, 3), -1), 100)
    check_union(kernel, torch.full((5, 3), 99), 100)
    check_union(kernel, torch.randperm(1500, generator=generator()).view(100, 15), 1500)
    check_union(kernel, torch.zeros(4, 2, dtype=torch.int32), 3, torch.zeros(4, 2, dtype=torch.bool))
    check_union(kernel, torch.zeros(0, 2, dtype=torch.int32), 3)
    check_union(kernel, torch.full((1, 2), -1, dtype=torch.int32), 0)


def test_other_layouts_and_ids_out_of_range(fenced):
    ids = torch.randint(-5, 60, (9, 7), generator=generator(), dtype=torch.int32)
    valid = torch.rand(7, 9, generator=generator(1)) < 0.5
    check_union(kernel, transposed(ids), 50, valid.T)
    check_union(kernel, every_second_row(ids), 50)


def test_windows_hold_the_union_and_never_cut_it(fenced):
    ids = torch.randint(-1, 1300, (20, 30), generator=generator(), dtype=torch.int32)
    for capacity in (1000, 200, 97):
        check_window(window, ids, 1300, capacity)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("T", "K", "r", "E"), [(1, 1, 1, 1), (37, 64, 960, 48), (512, 4, 1025, 41), (9, 7, 50, 50)])
@pytest.mark.parametrize("masked", [False, True])
def test_picks_are_counted(fenced, dtype, T, K, r, E, masked):
    ids = torch.randint(-2, r + 2, (T, K), generator=generator(), dtype=dtype)
    check_load(window, ids, r, E, torch.rand(T, K, generator=generator(1)) < 0.7 if masked else None)


@given(st.data())
def test_any_ids(data):
    r = data.draw(st.integers(1, 50))
    K = data.draw(st.integers(1, 5))
    rows = data.draw(st.lists(st.lists(st.integers(-2, r + 1), min_size=K, max_size=K), max_size=6))
    ids = torch.tensor(rows, dtype=torch.int32).reshape(len(rows), K)
    valid = torch.rand(ids.shape, generator=generator()) < 0.8 if data.draw(st.booleans()) else None
    with pytest.MonkeyPatch.context() as patch, kernel_checks.fenced_memory(patch):
        check_union(kernel, ids, r, valid)
        check_window(window, ids, r, data.draw(st.integers(1, 9)), valid)


def test_limit_of_the_kernels():
    with pytest.raises(ValueError, match="r: at most 1048576 rows are possible, not 1048577"):
        kernel(torch.zeros(1, 1, dtype=torch.int32), (1 << 20) + 1)
