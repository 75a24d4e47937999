"""The oracle against a plain triple loop over tokens, neurons and columns."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meft.num_experts import default_num_experts, divisors_around
from meft.routing.reference import chosen_neurons, reference


def by_rank(scores, ids, n):
    """The n ids with the largest scores; of equal ones the lower."""
    return sorted(ids, key=lambda i: (-scores[i], i))[:n]


def picks_of_a_token(x, router, keys, P, K, factor):
    E, r = len(router), len(keys)
    logits = [sum(a * b for a, b in zip(x, row, strict=True)) for row in router]
    probed = by_rank(logits, range(E), P)
    scores = {}
    for e in probed:
        for j in range(e * r // E, (e + 1) * r // E):
            scores[j] = sum(a * b for a, b in zip(x, keys[j], strict=True)) * (logits[e] if factor else 1)
    kept = by_rank(scores, scores, K)
    return {j: scores[j] for j in kept if scores[j] > 0}, logits


def loops(x, router, keys, values, P, K, factor, real):
    """What the adapter adds, [T, d], by loops over python numbers."""
    x, router, keys, values = (m.tolist() for m in (x, router, keys, values))
    picks = [picks_of_a_token(t, router, keys, P, K, factor)[0] if ok else {} for t, ok in zip(x, real, strict=True)]
    y = []
    for t, own in zip(x, picks, strict=True):
        total = [0.0] * len(t)
        for j, score in own.items():
            for c in range(len(t)):
                total[c] += max(score, 0.0) * values[j][c]
        y.append(total)
    return torch.tensor(y, dtype=torch.float64).view(len(x), -1)


def draw(T, d, E, each, seed, integer):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((T, d), (E, d), (E * each, d), (E * each, d))
    if integer:  # small numbers: many ties, and every sum is exact
        return [torch.randint(-2, 3, shape, generator=generator).double() for shape in shapes]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@settings(deadline=None, max_examples=60)
@given(st.data(), st.booleans(), st.booleans())
def test_the_oracle_equals_loops(data, integer, factor):
    T, d, E, each = (data.draw(st.integers(low, high)) for low, high in ((1, 6), (1, 5), (1, 5), (1, 4)))
    P, K = data.draw(st.integers(1, E)), data.draw(st.integers(1, E * each))
    real = data.draw(st.lists(st.booleans(), min_size=T, max_size=T))
    x, router, keys, values = draw(T, d, E, each, data.draw(st.integers(0, 2**32)), integer)
    y = reference(
        x,
        router,
        keys,
        values,
        experts_per_token=P,
        top_k=K,
        router_factor=factor,
        real=torch.tensor(real),
    )
    expected = loops(x, router, keys, values, P, K, factor, real)
    if integer:
        assert torch.equal(y, expected)
    else:
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    chosen = chosen_neurons(x, router, keys, experts_per_token=P, top_k=K, router_factor=factor)
    for row, t in zip(chosen, x.tolist(), strict=True):
        assert row.nonzero().flatten().tolist() == sorted(
            picks_of_a_token(t, router.tolist(), keys.tolist(), P, K, factor)[0]
        )


def test_ties_go_to_the_lower_expert_and_neuron():
    x = torch.tensor([[1.0, 0.0]])
    router = torch.tensor([[1.0, 0.0], [2.0, 5.0], [2.0, -5.0], [2.0, 0.0]])
    keys = torch.tensor([[9.0, 0.0]] * 2 + [[1.0, 0.0]] * 6)
    for P, K, expected in ((1, 1, [2]), (1, 2, [2, 3]), (2, 3, [2, 3, 4]), (3, 5, [2, 3, 4, 5, 6]), (4, 1, [0])):
        chosen = chosen_neurons(x, router, keys, experts_per_token=P, top_k=K, router_factor=True)
        assert chosen[0].nonzero().flatten().tolist() == expected


def test_only_positive_scores_are_kept_and_nothing_fills_up():
    x = torch.tensor([[1.0], [-1.0], [0.0]])
    keys = torch.tensor([[3.0], [0.0], [-2.0], [1.0]])
    chosen = chosen_neurons(x, torch.ones(1, 1), keys, experts_per_token=1, top_k=4, router_factor=False)
    assert chosen.tolist() == [[True, False, False, True], [False, False, True, False], [False] * 4]
    # With the factor the expert's logit is -1 for the second token: it turns the signs around.
    chosen = chosen_neurons(x, torch.ones(1, 1), keys, experts_per_token=1, top_k=4, router_factor=True)
    assert chosen.tolist() == [[True, False, False, True], [True, False, False, True], [False] * 4]


def test_neurons_of_unprobed_experts_are_never_kept():
    x, router = torch.tensor([[1.0]]), torch.tensor([[2.0], [1.0]])
    keys = torch.tensor([[-1.0], [-1.0], [5.0], [5.0]])
    chosen = chosen_neurons(x, router, keys, experts_per_token=1, top_k=4, router_factor=True)
    assert not chosen.any()


def test_all_neurons_without_the_factor_are_a_dense_relu_adapter():
    x, router, keys, values = draw(9, 6, 4, 5, seed=1, integer=False)
    y = reference(x, router, keys, values, experts_per_token=4, top_k=20, router_factor=False)
    assert torch.equal(y, (x @ keys.T).relu() @ values)


def test_padding_gets_zeros_and_changes_nobody():
    x, router, keys, values = draw(8, 6, 4, 3, seed=2, integer=False)
    real = torch.tensor([True, False, True, True, False, True, True, False])
    fields = {"experts_per_token": 2, "top_k": 3}
    y = reference(x, router, keys, values, real=real, **fields)
    assert not y[~real].any()
    assert torch.equal(y[real], reference(x, router, keys, values, **fields)[real])


def test_injected_picks_are_used():
    x, router, keys, values = draw(5, 6, 4, 3, seed=3, integer=False)
    chosen = torch.zeros(5, 12, dtype=torch.bool)
    chosen[:, [1, 7]] = True
    y = reference(x, router, keys, values, experts_per_token=1, top_k=1, router_factor=False, chosen=chosen)
    torch.testing.assert_close(y, (x @ keys[[1, 7]].T).relu() @ values[[1, 7]], rtol=1e-13, atol=1e-13)


def test_autograd_differentiates_the_oracle():
    inputs = [t.requires_grad_() for t in draw(5, 4, 3, 4, seed=4, integer=False)]
    assert torch.autograd.gradcheck(lambda *i: reference(*i, experts_per_token=2, top_k=3), inputs)


# ---------------------------------------------------------------------- the number of experts


@pytest.mark.parametrize(("r", "experts"), [(4096, 256), (6400, 320), (8464, 368), (1, 1), (2, 2), (64, 32), (97, 1)])
def test_the_papers_numbers_of_experts(r, experts):
    assert default_num_experts(r) == experts


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 5000))
def test_the_number_of_experts_is_the_nearest_divisor(r):
    experts, target = default_num_experts(r), 4 * math.sqrt(r)
    assert r % experts == 0
    divisors = [n for n in range(1, r + 1) if r % n == 0]
    assert abs(experts - target) == min(abs(n - target) for n in divisors)
    assert experts == min(n for n in divisors if abs(n - target) == abs(experts - target))


def test_divisors_around_a_number():
    assert divisors_around(12, 5) == [4, 6]
    assert divisors_around(12, 4) == [4]
    assert divisors_around(12, 0.5) == [1]
    assert divisors_around(12, 99) == [12]
