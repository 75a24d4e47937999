"""What a table's optimizer remembers, against a plain oracle and torch's own optimizers on the whole matrix."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from meft import moments as moments_module
from meft.moments import Moments
from meft.row_update import StepRule
from meft.store import RowTable

R, D = 9, 4
RULE = StepRule(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, decoupled=True)

rules = st.builds(
    StepRule,
    lr=st.floats(1e-4, 1e-1),
    beta1=st.sampled_from([0.0, 0.5, 0.9]),
    beta2=st.sampled_from([0.5, 0.999]),
    eps=st.sampled_from([1e-8, 1e-3]),
    weight_decay=st.sampled_from([0.0, 0.3]),
    decoupled=st.booleans(),
)
touches = st.sets(st.integers(0, R - 1)).map(sorted)
runs = st.lists(st.tuples(rules, touches), min_size=1, max_size=10)


def table(dtype=torch.float64):
    return torch.randn(R, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def grads(rows, step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    return torch.tensor(rows, dtype=torch.int64), torch.randn(len(rows), D, generator=generator).to(dtype)


def lazy_oracle(p, steps):
    """Row by row; yields the state after each step."""
    p, m, v, n = p.double().clone(), torch.zeros(R, D).double(), torch.zeros(R, D).double(), [0] * R
    for step, (rule, rows) in enumerate(steps, 1):
        for row, g in zip(rows, grads(rows, step)[1], strict=True):
            n[row] += 1
            if rule.decoupled:
                p[row] *= 1 - rule.lr * rule.weight_decay
            else:
                g = g + rule.weight_decay * p[row]
            m[row] = rule.beta1 * m[row] + (1 - rule.beta1) * g
            v[row] = rule.beta2 * v[row] + (1 - rule.beta2) * g * g
            root = (v[row] / (1 - rule.beta2 ** n[row])).sqrt()
            p[row] -= rule.lr * m[row] / (1 - rule.beta1 ** n[row]) / (root + rule.eps)
        yield p, m, v, n


def dense_oracle(p, steps):
    """torch's AdamW or Adam on the whole matrix; yields parameter and moments after each step."""
    p = nn.Parameter(p.clone())
    optimizers = [kind([p], foreach=False) for kind in (torch.optim.Adam, torch.optim.AdamW)]
    for optimizer in optimizers:
        optimizer.state = optimizers[0].state  # one history, whichever of them steps
    for step, (rule, rows) in enumerate(steps, 1):
        p.grad = torch.zeros_like(p)
        index, values = grads(rows, step, p.dtype)
        p.grad[index] = values
        optimizer = optimizers[int(rule.decoupled)]
        fields = {"lr": rule.lr, "betas": (rule.beta1, rule.beta2), "eps": rule.eps}
        optimizer.param_groups[0].update(fields | {"weight_decay": rule.weight_decay})
        optimizer.step()
        yield p.detach(), optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]


@settings(deadline=None, max_examples=30)
@given(runs)
def test_lazy_steps_equal_the_plain_rule(steps):
    p = table()
    own = Moments.fresh(p, dense=False, seed=0)
    for step, ((rule, rows), expected) in enumerate(zip(steps, lazy_oracle(p, steps), strict=True), 1):
        before = [t.clone() for t in (p, own.exp_avg, own.exp_avg_sq, own.counts)]
        own.update(p, None, *grads(rows, step), rule)
        untouched = [i for i in range(R) if i not in rows]
        for old, new in zip(before, (p, own.exp_avg, own.exp_avg_sq, own.counts), strict=True):
            assert torch.equal(old[untouched], new[untouched])
        for ours, theirs in zip((p, own.exp_avg, own.exp_avg_sq), expected, strict=False):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
        assert own.counts.tolist() == expected[3]
        assert own.step == step
        assert not own.lags


@settings(deadline=None, max_examples=30)
@given(runs, st.lists(touches, min_size=10, max_size=10))
def test_dense_steps_equal_torchs_whenever_rows_are_read(steps, reads):
    p = table()
    own = Moments.fresh(p, dense=True, seed=0)
    pairs = zip(steps, reads, dense_oracle(p, steps), strict=False)
    for step, ((rule, rows), read, expected) in enumerate(pairs, 1):
        own.update(p, None, *grads(rows, step), rule)
        own.catch_up(p, None, torch.tensor(read, dtype=torch.int64))
        for ours, theirs in zip((p, own.exp_avg, own.exp_avg_sq), expected, strict=True):
            current = sorted({*rows, *read})
            torch.testing.assert_close(ours[current], theirs[current], rtol=1e-12, atol=1e-14)
    own.catch_up(p, None, None)
    for ours, theirs in zip((p, own.exp_avg, own.exp_avg_sq), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert own.counts.tolist() == [len(steps)] * R
    assert not own.lags


@settings(deadline=None, max_examples=20)
@given(runs, st.lists(st.booleans(), min_size=10, max_size=10), st.sampled_from([torch.float64, torch.float32]))
def test_when_rows_catch_up_changes_no_bit(steps, reads, dtype):
    states = []
    for often in (False, True):
        p = table(dtype)
        own = Moments.fresh(p, dense=True, seed=0)
        for step, ((rule, rows), read) in enumerate(zip(steps, reads, strict=False), 1):
            own.update(p, None, *grads(rows, step, dtype), rule)
            if often and read:
                own.catch_up(p, None, None)
        own.catch_up(p, None, None)
        states.append([p, own.exp_avg, own.exp_avg_sq, own.counts])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize("longest", [1, 3, 7])
def test_a_long_history_is_replayed_and_forgotten(monkeypatch, longest):
    steps = [(StepRule(1e-2 / n, 0.9, 0.99, 1e-8, 0.1, True), [n % R]) for n in range(1, 20)]
    p, lengths = table(), []
    *_, expected = dense_oracle(p, steps)
    monkeypatch.setattr(moments_module, "LONGEST_HISTORY", longest)
    own = Moments.fresh(p, dense=True, seed=0)
    for step, (rule, rows) in enumerate(steps, 1):
        own.update(p, None, *grads(rows, step), rule)
        lengths.append(len(own.history))
    assert lengths == [n % longest for n in range(1, 20)]
    own.catch_up(p, None, None)
    for ours, theirs in zip((p, own.exp_avg, own.exp_avg_sq), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_the_history_is_bounded_as_it_stands():
    p = torch.zeros(3, 2)
    own = Moments.fresh(p, dense=True, seed=0)
    for step in range(moments_module.LONGEST_HISTORY + 5):
        own.update(p, None, torch.tensor([step % 2]), torch.ones(1, 2), RULE)
    assert len(own.history) == 5
    assert own.step == moments_module.LONGEST_HISTORY + 5


def test_a_step_that_touches_nothing_counts_in_dense_mode():
    steps = [(RULE, [1, 2]), (RULE, []), (RULE, []), (RULE, [2])]
    p = table()
    *_, expected = dense_oracle(p, steps)
    own = Moments.fresh(p, dense=True, seed=0)
    for step, (rule, rows) in enumerate(steps, 1):
        own.update(p, None, *grads(rows, step), rule)
    own.catch_up(p, None, None)
    torch.testing.assert_close(p, expected[0], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tensors_and_back_continue_bit_for_bit(dtype, dense):
    p = table(dtype)
    own = Moments.fresh(p, dense=dense, seed=5)
    for step, rows in enumerate(([0, 1, 5], [2], [], [1, 8]), 1):
        own.update(p, None, *grads(rows, step, dtype), RULE)
    parts = own.tensors()
    assert parts["exp_avg"] is own.exp_avg  # the big ones are no copies
    assert all(isinstance(t, torch.Tensor) for t in parts.values())
    other_p, other = p.clone(), Moments.from_tensors(copy.deepcopy(parts))
    assert (other.dense, other.step, other.seed, other.history) == (dense, 4, 5, own.history)
    for moments, rows in ((own, p), (other, other_p)):
        for step in (5, 6):
            moments.update(rows, None, *grads([0, 3], step, dtype), RULE)
        moments.catch_up(rows, None, None)
    assert torch.equal(p, other_p)
    assert all(torch.equal(a, b) for a, b in zip(own.tensors().values(), other.tensors().values(), strict=True))


def test_a_history_of_both_rules_comes_back():
    own = Moments.fresh(table(), dense=True, seed=0)
    own.history = [RULE, StepRule(1 / 3, 0.1, 0.2, 1e-30, 0.7, False)]
    assert Moments.from_tensors(own.tensors()).history == own.history
    assert Moments.from_tensors(Moments.fresh(table(), dense=True, seed=0).tensors()).history == []


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_fresh_moments_are_zero_and_wide(dtype, expected):
    own = Moments.fresh(table(dtype), dense=False, seed=0)
    assert own.exp_avg.dtype == own.exp_avg_sq.dtype == expected
    assert own.counts.dtype == torch.int32
    assert not any(t.any() for t in (own.exp_avg, own.exp_avg_sq, own.counts))
    assert (own.step, own.history, own.lags) == (0, [], False)


def test_moments_follow_a_table_to_a_device():
    own = Moments.fresh(table(), dense=False, seed=0)
    own.move(torch.device("meta"))
    assert {t.device.type for t in (own.exp_avg, own.exp_avg_sq, own.counts)} == {"meta"}


# ---------------------------------------------------------------------- reading a table whose rows lag


def lagging(wire=torch.float64):
    """A table some of whose rows have missed steps, and what its rows are when they catch up."""
    steps = [(RULE, rows) for rows in ([0, 1, 2], [2, 3], [1], [7])]
    made = RowTable((R, D), master=torch.float64, wire=wire, on_host=True, pin=False)
    with torch.no_grad():
        made.rows.copy_(table())
    *_, (expected, _, _) = dense_oracle(table(), steps)
    made.moments = Moments.fresh(made.rows.detach(), dense=True, seed=0)
    for step, (rule, rows) in enumerate(steps, 1):
        made.writing(lambda w, s=step, u=rule, r=rows: made.moments.update(made.rows.detach(), w, *grads(r, s), u))
    assert not torch.allclose(made.rows.detach(), expected, rtol=1e-9)
    return made, expected


def test_reading_all_rows_sees_them_current():
    made, expected = lagging()
    with made.reading() as rows:
        torch.testing.assert_close(rows, expected, rtol=1e-12, atol=1e-14)
    assert not made.moments.lags


def test_reading_some_rows_sees_them_current_and_leaves_the_others():
    made, expected = lagging()
    before, some, others = made.rows.detach().clone(), torch.tensor([0, 3, 5]), torch.tensor([1, 2, 4, 6, 8])
    with made.reading(some) as rows:
        torch.testing.assert_close(rows[some], expected[some], rtol=1e-12, atol=1e-14)
        assert torch.equal(rows[others], before[others])
    assert made.moments.lags


def test_the_narrow_copy_catches_up_too():
    made, expected = lagging(wire=torch.bfloat16)
    with made.reading(torch.tensor([0, 3])) as rows:
        assert rows.dtype == torch.bfloat16
        assert torch.equal(rows[[0, 3]], made.rows.detach()[[0, 3]].bfloat16())
    with made.reading() as rows:
        assert torch.equal(rows, made.rows.detach().bfloat16())
    torch.testing.assert_close(made.rows.detach(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.state_dict()["rows"],
        lambda t: nn.Sequential(t).state_dict()["0.rows"],
        lambda t: t.float().rows.detach().double(),
    ],
    ids=["state_dict", "state_dict of a parent", "cast"],
)
def test_whoever_takes_the_rows_gets_them_current(read):
    made, expected = lagging()
    torch.testing.assert_close(read(made), expected, rtol=1e-6, atol=1e-7)


def test_a_copy_catches_up_as_the_original_does():
    made, expected = lagging()
    twin = copy.deepcopy(made)
    assert twin.moments is not made.moments
    for one in (twin, made):
        with one.reading() as rows:
            torch.testing.assert_close(rows, expected, rtol=1e-12, atol=1e-14)


def test_reading_under_inference_mode_catches_up():
    made, expected = lagging()
    with torch.inference_mode(), made.reading() as rows:
        torch.testing.assert_close(rows.clone(), expected, rtol=1e-12, atol=1e-14)
    made.writing(lambda w: made.moments.update(made.rows.detach(), w, *grads([1], 9), RULE))


def test_a_narrow_copy_made_under_inference_mode_can_be_rewritten():
    made, _ = lagging(wire=torch.bfloat16)
    made._wire = None
    with torch.inference_mode(), made.reading():
        pass
    with torch.no_grad():
        made.rows.zero_()
    with made.reading() as rows:
        assert not rows.any()


def test_catching_up_makes_no_backward_pass_wrong():
    made, _ = lagging()
    version = made.rows._version
    with made.reading(torch.tensor([0, 3])):
        pass
    assert made.rows._version == version


def test_loaded_rows_are_not_caught_up():
    made, expected = lagging()
    fresh = torch.zeros_like(expected)
    made.load_state_dict({"rows": fresh})
    with made.reading() as rows:
        assert torch.equal(rows, fresh)
