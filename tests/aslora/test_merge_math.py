"""Pure functions over sharing maps and distances, each beside a naive form."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aslora.sharing.merge_math import (
    change_of_basis,
    closest_pair,
    common_refinement,
    groups_of,
    is_sharing_map,
    merged,
    planned_merges,
    squared_distances,
)


@st.composite
def sharing_maps(draw, layers=None):
    """A map that merges lead to, drawn merge by merge."""
    n = draw(st.integers(1, 9)) if layers is None else layers
    rows = list(range(n))
    for _ in range(draw(st.integers(0, n - 1))):
        live = list(groups_of(rows))
        low = draw(st.integers(0, len(live) - 2))
        up = draw(st.integers(low + 1, len(live) - 1))
        rows = merged(rows, live[low], live[up])
    return rows


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------- how many, and maps


@pytest.mark.parametrize(("layers", "merges"), [(1, 0), (2, 1), (3, 2), (4, 2), (6, 4), (12, 7), (32, 19)])
def test_the_default_number_of_merges(layers, merges):
    assert planned_merges(layers, None) == merges


def test_a_given_number_of_merges_is_kept_but_a_single_layer_has_none():
    assert planned_merges(12, 3) == 3
    assert planned_merges(12, 0) == 0
    assert planned_merges(1, 3) == 0


def test_groups_come_in_the_order_of_their_lowest_layers():
    rows = [4, 1, 2, 1, 4]
    assert groups_of(rows) == {4: [0, 4], 1: [1, 3], 2: [2]}
    assert list(groups_of(rows)) == [4, 1, 2]


@given(rows=sharing_maps())
def test_merges_keep_maps_valid(rows):
    assert is_sharing_map(rows)
    assert sorted(layer for group in groups_of(rows).values() for layer in group) == list(range(len(rows)))


@pytest.mark.parametrize("rows", [[1, 0], [1, 2, 2], [0, 3], [-1, 1], [2, 2, 1]])
def test_what_is_no_map(rows):
    assert not is_sharing_map(rows)


@given(data=st.data(), layers=st.integers(1, 8), count=st.integers(1, 4))
def test_refinement_shares_exactly_where_all_maps_share(data, layers, count):
    maps = [data.draw(sharing_maps(layers)) for _ in range(count)]
    refined = common_refinement(maps)
    assert is_sharing_map(refined)
    for i in range(layers):
        for j in range(layers):
            assert (refined[i] == refined[j]) == all(rows[i] == rows[j] for rows in maps)


# ---------------------------------------------------------------------- distances


def test_factor_is_equation_4():
    averages = random(5, 7, 3)
    squares = squared_distances(averages)
    for i in range(5):
        for j in range(5):
            naive = sum(float(a - b) ** 2 for a, b in zip(averages[i].flatten(), averages[j].flatten(), strict=True))
            assert squares[i, j].item() == pytest.approx(naive, rel=1e-13)
    assert squares.dtype == torch.float64


def test_equal_matrices_have_distance_zero_and_near_ones_do_not():
    averages = random(3, 50, 4).float()
    averages[2] = averages[0]
    averages[2, 0, 0] += 2e-7 * averages[2, 0, 0].abs()  # a Gram matrix would lose this
    averages = torch.cat([averages, averages[:1]])
    assert squared_distances(averages)[0, 3] == 0
    assert squared_distances(averages, change_of_basis(random(4, 9)))[0, 3] == 0
    assert 0 < squared_distances(averages)[0, 2] < 1e-12


def test_product_is_the_distance_of_the_products():
    averages, A = random(4, 7, 3), random(3, 11, seed=1)
    squares = squared_distances(averages, change_of_basis(A))
    naive = torch.stack([((averages - b) @ A).square().sum((1, 2)) for b in averages])
    torch.testing.assert_close(squares, naive, rtol=1e-12, atol=1e-12)


def test_product_takes_an_a_that_has_lost_its_rank():
    A = random(1, 6).expand(3, 6)
    averages = random(3, 5, 3)
    naive = torch.stack([((averages - b) @ A).square().sum((1, 2)) for b in averages])
    torch.testing.assert_close(squared_distances(averages, change_of_basis(A)), naive, rtol=1e-10, atol=1e-10)


def test_product_does_not_depend_on_the_basis_and_factor_does():
    averages, A = random(4, 7, 3), random(3, 11, seed=1)
    Q = random(3, 3, seed=2)
    other_B, other_A = averages @ Q, torch.linalg.inv(Q) @ A
    torch.testing.assert_close(other_B @ other_A, averages @ A)
    product = squared_distances(averages, change_of_basis(A))
    torch.testing.assert_close(squared_distances(other_B, change_of_basis(other_A)), product, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(squared_distances(other_B), squared_distances(averages))


def test_another_basis_changes_the_choice_of_factor_but_not_that_of_product():
    # Rank 2, three layers: 0 and 1 differ in the first direction, 1 and 2 in the second, a little more.
    averages = torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]], [[0.0, 1.5]]], dtype=torch.float64)
    A, Q = torch.eye(2, dtype=torch.float64), torch.diag(torch.tensor([10.0, 0.1], dtype=torch.float64))
    other_B, other_A = averages @ Q, torch.linalg.inv(Q) @ A
    assert closest_pair(squared_distances(averages), "all") == (0, 1)
    assert closest_pair(squared_distances(other_B), "all") == (1, 2)
    assert closest_pair(squared_distances(averages, change_of_basis(A)), "all") == (0, 1)
    assert closest_pair(squared_distances(other_B, change_of_basis(other_A)), "all") == (0, 1)


# ---------------------------------------------------------------------- which pair


def test_ties_go_to_the_lowest_pair():
    assert closest_pair(torch.zeros(4, 4), "all") == (0, 1)
    squares = torch.tensor([[0.0, 9, 1, 9], [9, 0, 9, 1], [1, 9, 0, 1], [9, 1, 1, 0]])
    assert closest_pair(squares, "all") == (0, 2)
    assert closest_pair(squares, "adjacent") == (2, 3)


@given(data=st.data(), count=st.integers(2, 7), candidates=st.sampled_from(["all", "adjacent"]))
def test_closest_pair_is_the_first_smallest(data, count, candidates):
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count) if candidates == "all" or j == i + 1]
    distances = torch.zeros(count, count, dtype=torch.float64)
    values = {(i, j): data.draw(st.integers(0, 5)) for i in range(count) for j in range(i + 1, count)}
    for (i, j), value in values.items():
        distances[i, j] = distances[j, i] = value
    assert closest_pair(distances, candidates) == min(pairs, key=lambda pair: (values[pair], pair))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_overflowed_are_farthest_and_no_reason_to_stop(bad):
    squares = torch.tensor([[0.0, bad, 5], [bad, 0, bad], [5, bad, 0]])
    assert closest_pair(squares, "all") == (0, 2)
    assert closest_pair(torch.full((3, 3), bad), "adjacent") == (0, 1)
