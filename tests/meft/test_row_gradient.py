"""Whatever happens to a gradient between backward and step, on stored rows and on the dense gradient alike."""

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from meft.gradient.row_gradient import RowGradient

R, D = 12, 5
aten = torch.ops.aten


def rows_of(*rows, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(rows), D, generator=generator, dtype=torch.float64).to(dtype)
    return torch.tensor(rows, dtype=torch.int64), values


def gradient(*rows, seed=0, like=None):
    like = torch.zeros(R, D, dtype=torch.float64) if like is None else like
    return RowGradient(*rows_of(*rows, seed=seed, dtype=like.dtype), like)


class Gather(torch.autograd.Function):
    """The sum of some rows, weighted; its gradient is stored, or dense."""

    @staticmethod
    def forward(ctx, table, rows, weights, stored):
        ctx.table, ctx.stored = table, stored
        ctx.save_for_backward(rows, weights)
        return (table[rows] * weights).sum()

    @staticmethod
    def backward(ctx, g):
        rows, weights = ctx.saved_tensors
        made = RowGradient(rows, g * weights, ctx.table)
        return made if ctx.stored else made.to_dense(), None, None, None


class Twins:
    """A table with stored gradients and an equal one with dense ones, each with a router beside it."""

    def __init__(self, dtype=torch.float64):
        self.stored, self.dense = (nn.Parameter(torch.ones(R, D, dtype=dtype)) for _ in range(2))
        self.routers = [nn.Parameter(torch.ones(3, dtype=dtype)) for _ in range(2)]

    def backward(self, *touches, factor=1.0, router=1.0):
        """touches: (rows, seed), each one use of the table in the same graph."""
        for table, own, stored in ((self.stored, self.routers[0], True), (self.dense, self.routers[1], False)):
            uses = [rows_of(*rows, seed=seed, dtype=table.dtype) for rows, seed in touches]
            loss = sum(Gather.apply(table, rows, weights, stored) for rows, weights in uses)
            ((loss + router * own.square().sum()) * factor).backward()

    def parameters(self):
        return [self.stored, self.routers[0]], [self.dense, self.routers[1]]

    def assert_equal(self, rtol=1e-14):
        assert isinstance(self.stored.grad, RowGradient)
        torch.testing.assert_close(self.stored.grad.to_dense(), self.dense.grad, rtol=rtol, atol=1e-15)
        torch.testing.assert_close(self.routers[0].grad, self.routers[1].grad, rtol=rtol, atol=1e-15)


# ---------------------------------------------------------------------- what it is


def test_it_looks_like_the_tables_gradient():
    table = nn.Parameter(torch.zeros(R, D, dtype=torch.bfloat16))
    g = RowGradient(*rows_of(1, 4, dtype=torch.float32), table)
    assert (g.shape, g.dtype, g.device, g.requires_grad) == (table.shape, table.dtype, table.device, False)
    assert g.row_values.dtype == torch.float32
    assert repr(g) == "RowGradient(shape=[12, 5], rows=2, dtype=torch.bfloat16)"
    dense = g.to_dense()
    assert torch.equal(dense[[1, 4]], g.row_values)
    assert int(dense.any(1).sum()) == 2


def test_an_operation_in_place_that_would_write_into_other_rows_says_what_to_do():
    for operation in (torch.exp_, lambda t: t.sub_(1), lambda t: t.fill_(1.0), lambda t: torch._foreach_exp_([t])):
        g = gradient(1, 4)
        before = g.to_dense()
        with pytest.raises(NotImplementedError, match=r"MEFT rows \(RowGradient\).*\.to_dense\(\)"):
            operation(g)
        assert torch.equal(g.to_dense(), before)


@pytest.mark.parametrize(
    "look",
    [lambda t: t @ t.T, lambda t: t[4], torch.sum, torch.isfinite, lambda t: t.abs().max(), lambda t: t * 2],
)
def test_whoever_looks_at_it_sees_the_whole(look):
    g = gradient(1, 4)
    assert torch.equal(look(g), look(g.to_dense()))


def test_it_adds_to_a_plain_gradient():
    g, plain = gradient(1, 4), torch.randn(R, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for add in (lambda: g + plain, lambda: plain + g, lambda: g.add_(plain)):  # autograd alone may make it dense
        with pytest.raises(NotImplementedError, match=r"MEFT rows"):
            add()
    plain[[row for row in range(R) if row not in (1, 4)]] = 0
    expected = g.to_dense() + plain
    for total in (g + plain, plain + g, g.clone().add_(plain)):
        assert torch.equal(total.to_dense(), expected)
        assert total.rows.tolist() == [1, 4]


def test_it_adds_in_place_to_a_plain_gradient():
    g, plain = gradient(1, 4), torch.randn(R, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = g.to_dense() + plain
    plain.add_(g)
    torch.testing.assert_close(plain, expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    "penalty_first",
    [
        True,
        False,
    ],
)
def test_a_penalty_on_all_rows_adds_up_with_it(penalty_first):
    table = nn.Parameter(torch.ones(R, D, dtype=torch.float64))
    rows, weights = rows_of(1, 4)
    losses = [lambda: Gather.apply(table, rows, weights, True), lambda: table.square().sum()]
    for loss in reversed(losses) if penalty_first else losses:
        loss().backward()
    expected = torch.full((R, D), 2.0, dtype=torch.float64).index_add_(0, rows, weights)
    found = table.grad.to_dense() if isinstance(table.grad, RowGradient) else table.grad
    torch.testing.assert_close(found, expected, rtol=1e-15, atol=0)
    table.grad = None
    (losses[0]() + losses[1]()).backward()
    torch.testing.assert_close(table.grad.to_dense(), expected, rtol=1e-15, atol=0)


# ---------------------------------------------------------------------- accumulation


TOUCHES = {
    "equal rows": [((1, 4, 7), 0), ((1, 4, 7), 1)],
    "overlap": [((1, 4, 7), 0), ((0, 4, 11), 1)],
    "disjoint": [((1, 2), 0), ((5, 6), 1)],
    "empty first": [((), 0), ((3,), 1)],
    "empty last": [((3,), 0), ((), 1)],
    "both empty": [((), 0), ((), 1)],
}


@pytest.mark.parametrize("touches", TOUCHES.values(), ids=TOUCHES)
def test_gradients_add_up_over_backward_passes(touches):
    twins = Twins()
    for touch in [*touches, *touches]:
        twins.backward(touch)
    twins.assert_equal()
    assert twins.stored.grad.rows.tolist() == sorted({row for rows, _ in touches for row in rows})


@pytest.mark.parametrize("touches", TOUCHES.values(), ids=TOUCHES)
def test_gradients_add_up_within_one_graph(touches):
    twins = Twins()
    twins.backward(*touches, touches[0])
    twins.assert_equal()
    twins.backward(*touches, factor=0.5)
    twins.assert_equal()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.sets(st.integers(0, R - 1)), min_size=1, max_size=3), min_size=1, max_size=4))
def test_gradients_add_up_over_any_touches(passes):
    twins = Twins()
    for i, uses in enumerate(passes):
        twins.backward(*((sorted(rows), 10 * i + n) for n, rows in enumerate(uses)))
    twins.assert_equal()
    rows = twins.stored.grad.rows
    assert bool((rows.diff() > 0).all())


def test_accumulating_does_not_change_gradients_that_others_hold():
    table = nn.Parameter(torch.ones(R, D, dtype=torch.float64))
    rows, weights = rows_of(1, 4)
    made = torch.autograd.grad(Gather.apply(table, rows, weights, True), table)[0]
    before = made.to_dense()
    table.grad = made.clone()
    Gather.apply(table, rows, weights, True).backward()
    assert torch.equal(made.to_dense(), before)
    assert torch.equal(table.grad.to_dense(), 2 * before)


def test_autograd_grad_returns_it():
    table = nn.Parameter(torch.ones(R, D, dtype=torch.float64))
    (rows, weights), (others, more) = rows_of(1, 4), rows_of(4, 9, seed=1)
    loss = Gather.apply(table, rows, weights, True) + Gather.apply(table, others, more, True)
    (made,) = torch.autograd.grad(loss, table)
    assert isinstance(made, RowGradient)
    assert made.rows.tolist() == [1, 4, 9]
    expected = torch.zeros(R, D, dtype=torch.float64).index_add_(0, rows, weights).index_add_(0, others, more)
    torch.testing.assert_close(made.to_dense(), expected)
    assert table.grad is None


def test_addition_takes_a_factor():
    a, b = gradient(1, 2), gradient(2, 3, seed=1)
    expected = a.to_dense() - 0.5 * b.to_dense()
    for total in (torch.add(a, b, alpha=-0.5), a.clone().add_(b, alpha=-0.5)):
        torch.testing.assert_close(total.to_dense(), expected, rtol=1e-15, atol=1e-15)
    assert b.rows.tolist() == [2, 3]


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(to_none, foreach):
    twins = Twins()
    twins.backward(((1, 4), 0))
    for parameters in twins.parameters():
        torch.optim.AdamW(parameters, foreach=foreach).zero_grad(set_to_none=to_none)
    if to_none:
        assert twins.stored.grad is None
    else:
        twins.assert_equal()
        assert not len(twins.stored.grad.rows)
    twins.backward(((4, 5), 1))
    twins.assert_equal()
    assert twins.stored.grad.rows.tolist() == [4, 5]
    module = nn.Module()
    module.table = twins.stored
    module.zero_grad(set_to_none=to_none)
    assert (twins.stored.grad is None) == to_none


def test_a_zeroed_gradient_keeps_no_memory():
    g = gradient(*range(R))
    g.zero_()
    assert g.row_values.untyped_storage().nbytes() == 0


# ---------------------------------------------------------------------- clipping and scaling


@pytest.mark.parametrize("touch", [((1, 4, 7), 0), ((), 0)], ids=["rows", "empty"])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
@pytest.mark.parametrize("foreach", [None, True, False])
def test_clipping_by_global_norm_equals_that_of_dense_gradients(foreach, norm_type, touch):
    for most in (0.1, 100.0):
        twins = Twins()
        twins.backward(touch, factor=3.0)
        norms = [nn.utils.clip_grad_norm_(p, most, norm_type, foreach=foreach) for p in twins.parameters()]
        torch.testing.assert_close(*norms, rtol=1e-14, atol=0)
        assert type(norms[0]) is torch.Tensor
        twins.assert_equal()


def test_clipping_finds_norms_that_are_not_finite():
    for bad in (torch.inf, torch.nan):
        twins = Twins()
        twins.backward(((1, 4), 0))
        twins.stored.grad.row_values[1, 2] = twins.dense.grad[4, 2] = bad
        for parameters in twins.parameters():
            with pytest.raises(RuntimeError, match="non-finite"):
                nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_clipping_by_value_equals_that_of_dense_gradients(foreach):
    twins = Twins()
    twins.backward(((1, 4, 7), 0), factor=3.0)
    for parameters in twins.parameters():
        nn.utils.clip_grad_value_(parameters, 0.7, foreach=foreach)
    twins.assert_equal()
    assert twins.stored.grad.row_values.abs().max() == 0.7


def test_accelerates_clipping_equals_that_of_dense_gradients():
    accelerator = Accelerator(cpu=True)
    for norm_type in (2, float("inf")):
        twins = Twins()
        twins.backward(((1, 4, 7), 0), factor=3.0)
        norms = [accelerator.clip_grad_norm_(p, 0.3, norm_type) for p in twins.parameters()]
        torch.testing.assert_close(*norms, rtol=1e-14, atol=0)
        twins.assert_equal()
        for parameters in twins.parameters():
            accelerator.clip_grad_value_(parameters, 0.01)
        twins.assert_equal()


def test_clamping_to_an_interval_without_zero_is_refused():
    g = gradient(1, 4)
    for bounds in ((0.5, 1.0), (-2.0, -1.0)):
        with pytest.raises(NotImplementedError, match="without 0"):
            g.clamp_(*bounds)


@pytest.mark.parametrize("bounds", [{"min": 0.5}, {"max": -0.5}], ids=str)
def test_clamping_to_one_bound_without_zero_is_refused(bounds):
    with pytest.raises(NotImplementedError, match="without 0"):
        gradient(1, 4).clamp_(**bounds)
    foreach = torch._foreach_clamp_min_ if "min" in bounds else torch._foreach_clamp_max_
    with pytest.raises(NotImplementedError, match="without 0"):
        foreach([gradient(1, 4)], *bounds.values())


def test_a_grad_scaler_unscales_rows_and_finds_infinities():
    for value, found in ((1.0, False), (torch.inf, True), (torch.nan, True)):
        twins = Twins(torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        scaler.scale(torch.ones(()))  # makes the scale
        twins.backward(((1, 4, 7), 0), factor=64.0)
        for grad, row in ((twins.stored.grad.row_values, 1), (twins.dense.grad, 4)):
            grad[row, 2] *= value
        verdicts = []
        for parameters in twins.parameters():
            optimizer = torch.optim.SGD(parameters, lr=0.1)
            scaler.unscale_(optimizer)
            states = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
            verdicts.append(any(bool(v) for v in states.values()))
        assert verdicts == [found, found]
        if not found:
            twins.assert_equal(rtol=1e-6)
            assert twins.stored.grad.row_values.abs().max() < 10


def test_unscaling_nothing_finds_nothing():
    table = nn.Parameter(torch.zeros(R, D))
    table.grad = RowGradient(torch.zeros(0, dtype=torch.int64), torch.zeros(0, D), table)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.ones(()))
    optimizer = torch.optim.SGD([table], lr=0.1)
    scaler.unscale_(optimizer)
    assert not any(bool(v) for v in scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values())


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.mul_(2.5),
        lambda g: g.mul_(torch.tensor(2.5, dtype=torch.float64)),
        lambda g: g.div_(2.5),
        lambda g: g.div_(torch.tensor(2.5, dtype=torch.float64)),
        lambda g: g.neg_(),
        lambda g: g.clamp_(-0.3, 0.2),
        lambda g: g.clamp_(min=-0.3),
        lambda g: g.clamp_(max=0.2),
        lambda g: torch._foreach_mul_([g], 2.5),
        lambda g: torch._foreach_mul_([g], torch.tensor(2.5, dtype=torch.float64)),
        lambda g: torch._foreach_div_([g], 2.5),
        lambda g: torch._foreach_zero_([g]),
    ],
)
@pytest.mark.parametrize("rows", [(1, 4), ()], ids=["rows", "empty"])
def test_operations_in_place_equal_those_on_the_dense_gradient(change, rows):
    g = gradient(*rows)
    dense = g.to_dense().clone()
    change(g)
    change(dense)
    assert torch.equal(g.to_dense(), dense + 0.0)


def test_copies_are_independent_and_detached_ones_share():
    g = gradient(1, 4)
    before = g.to_dense()
    copied, detached = g.clone(), g.detach()
    g.mul_(2)
    assert torch.equal(copied.to_dense(), before)
    assert torch.equal(detached.to_dense(), 2 * before)
