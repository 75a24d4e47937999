"""Which rows are tied: values, recorded maps, and the flags of writes from outside."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aslora.sharing import host_values
from aslora.sharing import ties as ties_module
from aslora.sharing.merge_math import is_sharing_map, records_fit
from aslora.sharing.ties import Ties, any_of, filled, map_by_value, matches_values


def rows(*values, dtype=torch.float64):
    """A stack whose row i is filled with a value."""
    return torch.tensor(values, dtype=dtype)[:, None, None].repeat(1, 3, 40)


@pytest.mark.parametrize(
    ("values", "recorded", "expected"),
    [
        ((1, 2, 1, 3), (), [2, 1, 2, 3]),  # the highest
        ((1, 2, 1, 3), (0, 1, 0, 3), [0, 1, 0, 3]),  # or who it was
        ((1, 2, 1, 3), (0, 1, 1, 3), [2, 1, 2, 3]),  # a recorded map that the values contradict
        ((1, 1, 1, 3), (0, 0, 2, 3), [0, 0, 0, 3]),  # one more joins a group
        ((1, 1, 1, 1), (0, 0, 2, 2), [3, 3, 3, 3]),  # two groups have become one
        ((0, 0, 1, 0), (), [0, 1, 2, 3]),  # zero says nothing
        ((0, 0, 1, 0), (1, 1, 2, 3), [1, 1, 2, 3]),  # unless it is recorded
        ((1, 2, 1, 3), (9, -1, 0, 3), [2, 1, 2, 3]),  # no map
        ((1, 2, 1, 3), (0, 1), [2, 1, 2, 3]),
        ((float("nan"), 2, float("nan"), 3), (), [2, 1, 2, 3]),
        ((float("inf"), 2, float("-inf"), 3), (), [0, 1, 2, 3]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_map_that_values_give(values, recorded, expected, dtype):
    assert map_by_value(rows(*values, dtype=dtype), recorded) == expected


@pytest.mark.parametrize("size", [1, 2, 40])
def test_looking_at_rows_leaves_their_storage_resizable(size):
    """FSDP2 frees the whole parameter by resizing its storage."""
    B = torch.ones(3, size, 1)
    ties = Ties([0, 0, 2])
    map_by_value(B, [0, 0, 2]), ties.broken(B), ties.incomplete(B), ties.collect(B), matches_values(B, [0, 0, 2])
    B.untyped_storage().resize_(0)


def test_rows_are_compared_in_full():
    B = torch.randn(3, 50, 40)
    B[0] = B[2]
    assert map_by_value(B) == [2, 1, 2]
    B[0, 31, 7] += 1
    assert map_by_value(B) == map_by_value(B, [2, 1, 2]) == [0, 1, 2]
    assert not matches_values(B, [2, 1, 2])
    B[0] = B[2]
    B[0, 0, 0] = B[2, 0, 0] = 0.0
    B[2, 0, 0] = -0.0  # equal as a number, but another row
    assert not matches_values(B, [2, 1, 2])


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.lists(st.integers(-1, 8), min_size=1, max_size=8))
def test_any_recorded_map_leads_to_one_that_the_values_confirm(values, recorded):
    B = rows(*map(float, values))
    owners = map_by_value(B, recorded)
    assert is_sharing_map(owners)
    assert matches_values(B, owners)
    assert not Ties(owners).broken(B)
    assert not Ties(owners).incomplete(B)


def test_zero_rows_of_0_1_are_filled_and_others_are_not():
    assert torch.equal(filled(rows(0, 2, 3), [2, 1, 2]), rows(3, 2, 3))
    for values, recorded in (
        ((1, 2, 3), [2, 1, 2]),
        ((0, 2, 0), [2, 1, 2]),
        ((0, 2, 3), [0, 1, 2]),
        ((0, 2, 3), [7, 1, 2]),
    ):
        B = rows(*values)
        assert filled(B, recorded) is B


@pytest.fixture(params=["host", "device"])
def place(request, monkeypatch):
    """Also as on a device, where flags are tensors that are looked at once."""
    if request.param == "device":
        monkeypatch.setattr(ties_module, "on_host", lambda tensor: False)
        monkeypatch.setattr(host_values, "on_host", lambda tensor: False)
    return request.param


def test_flags(place):
    ties, B = Ties([2, 1, 2, 3]), rows(5, 1, 5, 3)
    assert not any_of([ties.broken(B), ties.incomplete(B), ties.misses(torch.tensor([2, 1, 2, 3]))])
    assert any_of([ties.misses(torch.tensor([2, 1, 2, 2]))])
    assert any_of([False, ties.incomplete(rows(5, 3, 5, 3))])
    assert not any_of([ties.incomplete(rows(0, 0, 0, 0))])
    B[0, 2, 39] += 1
    assert any_of([ties.broken(B), False])
    assert isinstance(ties.broken(B), bool if place == "host" else torch.Tensor)
    gradient = torch.ones(4, 3, 40)
    ties.collect(gradient)
    assert gradient[:, 0, 0].tolist() == [0, 1, 2, 1]


@pytest.mark.parametrize("written", ["rows of B", "equal rows", "the map", "the clock"])
def test_what_is_written_is_seen_wherever_it_lies(place, tiny, written):
    model = tiny.adapted()
    optimizer = tiny.train(model, 3)
    unit = model.base_model.run.units["default"][0]
    B = unit.leader
    assert not any_of(unit.change_flags())
    with torch.no_grad():
        if written == "rows of B":
            B.stacked_B.data[B.ties.mirrored[0], 0, 0] += 1
        elif written == "equal rows":
            one, other, *_ = B.live_rows
            B.stacked_B.data[one] = B.stacked_B[other]
        elif written == "the map":
            B.rows.data.copy_(torch.arange(4))
        else:
            B.clock.data[2] = 1
    assert any_of(unit.change_flags()) or (written, place) == ("the clock", "host")  # it is read anew there
    unit.reconcile() if written != "the clock" else tiny.backward(model)
    assert not any_of(unit.change_flags())
    assert B.finished
    optimizer.zero_grad()
    tiny.train(model, 2, optimizer, first=4)
    assert torch.equal(B.stacked_B, B.stacked_B[B.ties.owners])


def test_a_run_is_the_same_wherever_it_lies(place, tiny):
    model = tiny.adapted(merge_value="mean")
    tiny.train(model, 6)
    assert tiny.taken(model) == {"q": 2, "v": 2}
    assert [m["step"] for m in model.base_model.sharing_report().merges] == [2, 2, 4, 4]
    assert all(B.clock.tolist() == [4, 0, 1] for B in tiny.groups(model).values())


def test_records():
    none = [[-1, -1, -1]] * 2
    assert records_fit([0, 1, 2], none, [3, 3, 0])
    assert records_fit([2, 1, 2], [[1, 0, 2], *none[:1]], [3, 3, 0])
    assert records_fit([2, 1, 2], none, [3, 0, 1])
    assert not records_fit([2, 1, 2], none, [3, 3, 0])
    assert not records_fit([0, 1, 2], [[1, 0, 2], *none[:1]], [3, 0, 1])
    for clock in ([3, 3, 2], [-1, 0, 0], [3, 4, 0], [3, -1, 0]):
        assert not records_fit([0, 1, 2], none, clock)
