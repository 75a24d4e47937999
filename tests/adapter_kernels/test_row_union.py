"""row_union on the CPU: the torch path against the oracle, its unbacked size, its windows, its errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapter_kernels import debugging, row_union, row_union_window
from adapter_kernels.rows.row_union import _op, _window_op
from tests.support.kernels.selection_checks import check_load, check_union, check_window, generator


@given(st.integers(0, 9), st.integers(1, 6), st.integers(0, 40), st.booleans(), st.integers(1, 12), st.integers(0, 99))
def test_equals_the_oracle(T, K, r, masked, capacity, seed):
    g = generator(seed)
    ids = torch.randint(-2, r + 3, (T, K), generator=g, dtype=torch.int32)
    valid = torch.rand(T, K, generator=g) < 0.7 if masked else None
    check_union(row_union, ids, r, valid)
    check_union(row_union, ids.long(), r, valid)
    check_window(row_union_window, ids, r, capacity, valid)


@given(st.integers(0, 9), st.integers(1, 6), st.integers(1, 9), st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_picks_are_counted(T, K, E, each, masked, seed):
    g, r = generator(seed), E * each
    ids = torch.randint(-2, r + 3, (T, K), generator=g, dtype=torch.int32)
    check_load(row_union_window, ids, r, E, torch.rand(T, K, generator=g) < 0.7 if masked else None)


def test_registration():
    ids = torch.randint(-1, 50, (6, 4), generator=generator(), dtype=torch.int32)
    valid = torch.rand(6, 4, generator=generator()) < 0.7
    torch.library.opcheck(_op, (ids, valid, 50, None))
    torch.library.opcheck(_window_op, (ids, None, None, 50, 3, 8, None))
    torch.library.opcheck(_window_op, (ids, valid, torch.zeros(5, dtype=torch.int64), 50, 3, 8, None))

    def body(ids):
        rows, position = row_union(ids, 50)
        return rows * 2, rows.shape[0], position + 1

    compiled = torch.compile(body, fullgraph=True, backend="aot_eager")
    for picks in (ids, ids[:2], torch.full_like(ids, -1)):
        rows, count, position = compiled(picks)
        expected = body(picks)
        assert torch.equal(rows, expected[0])
        assert count == expected[1]
        assert torch.equal(position, expected[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros(3, 2)}, "ids: one of torch.int32, torch.int64"),
        ({"ids": torch.zeros(3, dtype=torch.int32)}, "ids: two dimensions"),
        ({"r": -1}, "r: 0 to"),
        ({"valid": torch.zeros(3, 2, dtype=torch.uint8)}, "valid: torch.bool is needed"),
        ({"valid": torch.zeros(2, 3, dtype=torch.bool)}, "valid: shape"),
        ({"valid": torch.zeros(3, 2, dtype=torch.bool, device="meta")}, "valid: is on meta, but ids is on cpu"),
        ({"capacity": 0}, "capacity: at least 1"),
        ({"start": -1}, "start: at least 0"),
        ({"load": torch.zeros(5)}, "load: torch.int64 is needed"),
        ({"load": torch.zeros(5, 1, dtype=torch.int64)}, "load: one contiguous dimension"),
        ({"load": torch.zeros(0, dtype=torch.int64)}, "load: 0 groups do not divide 5 rows"),
        ({"load": torch.zeros(4, dtype=torch.int64)}, "load: 4 groups do not divide 5 rows"),
        ({"load": torch.zeros(5, dtype=torch.int64, device="meta")}, "load: is on meta, but ids is on cpu"),
    ],
)
def test_bad_input(change, message):
    arguments = {"ids": torch.zeros(3, 2, dtype=torch.int32), "r": 5, "capacity": 4} | change
    with pytest.raises(ValueError, match=message):
        row_union_window(**arguments)


def test_debug_mode_looks_at_ids():
    ids = torch.tensor([[0, -1, 7]])
    assert row_union(ids, 5)[0].tolist() == [0]
    with debugging():
        assert row_union(ids, 8)[0].tolist() == [0, 7]
        with pytest.raises(ValueError, match="ids: ids outside of -1 to r - 1 = 4"):
            row_union(ids, 5)
