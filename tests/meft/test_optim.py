"""Rows under stock optimizers and under RowAdamW, against a plain float64 oracle and against dense training."""

import copy
import gc

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn

from meft import MEFTConfig, RowAdamW
from meft.gradient.row_gradient import RowGradient
from meft.layer import MEFTLayer
from meft.optim.optimizer_hook import RowSteps
from meft.routing.reference import reference
from meft.routing.router import Router, Routers
from meft.table.row_table import RowTable
from peft_bridge import watch_steps
from tests.support.models import llama

R, D = 10, 4


def bitsandbytes(name):
    """Of bitsandbytes, which is asked for when the optimizer is made: without it these tests are skipped."""
    return lambda p, **f: getattr(pytest.importorskip("bitsandbytes").optim, name)(p, **f)


ADAMS = {
    "adamw": lambda p, **f: torch.optim.AdamW(p, foreach=False, **f),
    "adamw foreach": lambda p, **f: torch.optim.AdamW(p, foreach=True, **f),
    "adamw fused": lambda p, **f: torch.optim.AdamW(p, fused=True, **f),
    "adam": lambda p, **f: torch.optim.Adam(p, foreach=False, **f),
    "adam foreach": lambda p, **f: torch.optim.Adam(p, foreach=True, **f),
    "adam fused": lambda p, **f: torch.optim.Adam(p, fused=True, **f),
    "adam decoupled": lambda p, **f: torch.optim.Adam(p, decoupled_weight_decay=True, **f),
    "bitsandbytes Adam": bitsandbytes("Adam"),
    "bitsandbytes AdamW": bitsandbytes("AdamW"),
    "bitsandbytes AdamW8bit": bitsandbytes("AdamW8bit"),
    "bitsandbytes Adam8bit": bitsandbytes("Adam8bit"),
    "bitsandbytes PagedAdamW": bitsandbytes("PagedAdamW"),
    "bitsandbytes PagedAdam8bit": bitsandbytes("PagedAdam8bit"),
}
COUPLED = {"adam", "adam foreach", "adam fused"}
HYPER = {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.2}


class Rows:
    """Keys, values and a router, followed as a model's are; gradients are given by hand."""

    def __init__(self, dtype=torch.float64, compute_dtype=None, row_optimizer=None):
        generator = torch.Generator().manual_seed(0)
        tables = [
            RowTable((R, D), master=dtype, compute_dtype=compute_dtype or dtype, on_host=True, pin=False)
            for _ in range(2)
        ]
        with torch.no_grad():
            for table in tables:
                table.rows.copy_(torch.randn(R, D, generator=generator, dtype=torch.float64))
        self.keys, self.values = tables
        self.routers = Routers({"default": Router(2, D, torch.float32)})
        with torch.no_grad():
            self.router.copy_(torch.randn(2, D, generator=generator))
        self.steps = RowSteps()
        self.steps.tables["default"] = tables
        self.steps.configs["default"] = MEFTConfig(
            r=R, num_experts=2, experts_per_token=1, top_k=2, row_optimizer=row_optimizer
        )
        self.steps.routers["default"] = [self.routers]
        watch_steps(self.steps)

    @property
    def router(self):
        return self.routers["default"].weight

    @property
    def parameters(self):
        return [self.keys.rows, self.values.rows, self.router]

    @property
    def tables(self):
        return self.steps.tables["default"]

    def give(self, step, scale=1.0):
        """Gradients that depend on `step` only, for some rows; they add to what is there."""
        for i, table in enumerate(self.tables):
            made = RowGradient(*touched(step, i, table.rows.dtype, scale), table.rows)
            table.rows.grad = made if table.rows.grad is None else table.rows.grad + made
        g = torch.randn(2, D, generator=torch.Generator().manual_seed(step)) * scale
        self.router.grad = g if self.router.grad is None else self.router.grad + g

    def clear(self):
        for p in self.parameters:
            p.grad = None

    def state(self):
        """Copies of all that a step may change."""
        found = [p.detach().clone() for p in self.parameters]
        for table in self.tables:
            found += [t.clone() for t in table.moments.tensors().values()] if table.moments is not None else []
        return found


def touched(step, table, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(100 * step + table)
    rows = torch.nonzero(torch.rand(R, generator=generator) < 0.4).flatten()
    return rows, torch.randn(len(rows), D, generator=generator, dtype=torch.float64).to(dtype) * scale


class Oracle:
    """One table, row by row in float64: what the lazy rule says."""

    def __init__(self, table):
        self.p = table.rows.detach().double().clone()
        self.m, self.v, self.n = torch.zeros_like(self.p), torch.zeros_like(self.p), [0] * R

    def step(self, rows, grads, *, lr, betas, eps, weight_decay, decoupled):
        (b1, b2), p, m, v = map(float, betas), self.p, self.m, self.v
        for row, g in zip(rows.tolist(), grads.double(), strict=True):
            self.n[row] += 1
            n = self.n[row]
            if decoupled:
                p[row] *= 1 - lr * weight_decay
            else:
                g = g + weight_decay * p[row]
            m[row] = b1 * m[row] + (1 - b1) * g
            v[row] = b2 * v[row] + (1 - b2) * g * g
            p[row] -= lr * m[row] / (1 - b1**n) / ((v[row] / (1 - b2**n)).sqrt() + eps)


def assert_follows(rows, oracles):
    for table, oracle in zip(rows.tables, oracles, strict=True):
        torch.testing.assert_close(table.rows.detach().double(), oracle.p, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(table.moments.exp_avg, oracle.m, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(table.moments.exp_avg_sq, oracle.v, rtol=1e-12, atol=1e-13)
        assert table.moments.counts.tolist() == oracle.n


def assert_same_bits(before, after):
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# ---------------------------------------------------------------------- stock Adam and AdamW


@pytest.mark.parametrize("name", ADAMS)
def test_stock_optimizers_train_rows_by_the_lazy_rule(name):
    rows = Rows()
    oracles = [Oracle(table) for table in rows.tables]
    alone = nn.Parameter(rows.router.detach().clone())
    optimizer, plain = ADAMS[name](rows.parameters, **HYPER), ADAMS[name]([alone], **HYPER)
    for step in range(6):
        rows.clear()
        rows.give(step)
        alone.grad = rows.router.grad.clone()
        before = rows.state()[:2]
        optimizer.step()
        plain.step()
        for i, oracle in enumerate(oracles):
            index, grads = touched(step, i)
            oracle.step(index, grads, **HYPER, decoupled=name not in COUPLED)
            untouched = [row for row in range(R) if row not in index.tolist()]
            assert torch.equal(rows.tables[i].rows.detach()[untouched], before[i][untouched])
            assert torch.equal(rows.tables[i].rows.grad.row_values, grads)  # to be looked at until zero_grad
        assert_follows(rows, oracles)
        assert torch.equal(rows.router, alone)  # the router is the optimizer's own affair
        assert all(optimizer.state[table.rows].keys() == {"step", "row_moments"} for table in rows.tables)
        assert all(optimizer.state[table.rows]["step"] == step + 1 for table in rows.tables)


def test_tensor_learning_rate_and_betas():
    rows = Rows()
    oracles = [Oracle(table) for table in rows.tables]
    fields = HYPER | {"lr": torch.tensor(3e-2, dtype=torch.float64), "betas": (torch.tensor(0.75), torch.tensor(0.875))}
    optimizer = torch.optim.AdamW(rows.parameters, foreach=False, **fields)
    for step in range(4):
        rows.clear()
        rows.give(step)
        optimizer.step()
        for i, oracle in enumerate(oracles):
            oracle.step(*touched(step, i), **HYPER | {"betas": (0.75, 0.875)}, decoupled=True)
        optimizer.param_groups[0]["lr"].mul_(1.0)
    assert_follows(rows, oracles)


@pytest.mark.parametrize("make", [torch.optim.AdamW, RowAdamW, pytest.param(bitsandbytes("AdamW8bit"), id="AdamW8bit")])
def test_each_group_has_its_own_rule_and_a_schedule_is_followed(make):
    rows = Rows()
    oracles = [Oracle(table) for table in rows.tables]
    groups = [
        {"params": [rows.keys.rows], "lr": 1e-2, "weight_decay": 0.0, "betas": (0.5, 0.9), "eps": 1e-5},
        {"params": [rows.values.rows, rows.router], "lr": 4e-2},
    ]
    optimizer = make(groups, **HYPER)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1))
    own = [{"lr": 1e-2, "weight_decay": 0.0, "betas": (0.5, 0.9), "eps": 1e-5}, HYPER | {"lr": 4e-2}]
    for step in range(5):
        rows.clear()
        rows.give(step)
        optimizer.step()
        scheduler.step()
        for i, oracle in enumerate(oracles):
            oracle.step(*touched(step, i), **own[i] | {"lr": own[i]["lr"] / (step + 1)}, decoupled=True)
    assert_follows(rows, oracles)


@pytest.mark.parametrize("flag", ["amsgrad", "maximize"])
def test_amsgrad_and_maximize_are_refused_before_anything_moves(flag):
    for kind in (torch.optim.Adam, torch.optim.AdamW):
        rows = Rows()
        optimizer = kind(rows.parameters, **HYPER, **{flag: True})
        rows.give(0)
        before = rows.state()
        with pytest.raises(ValueError, match=rf"{kind.__name__} has {flag}=True.*set it to False"):
            optimizer.step()
        assert_same_bits(before, rows.state())
        assert not optimizer.state


def test_a_table_without_a_gradient_is_left_alone():
    rows = Rows()
    optimizer = torch.optim.AdamW(rows.parameters, **HYPER)
    rows.give(0)
    rows.keys.rows.grad = None
    before = rows.keys.rows.detach().clone()
    optimizer.step()
    assert torch.equal(rows.keys.rows, before)
    assert rows.keys.moments is None
    assert optimizer.state[rows.values.rows]["step"] == 1


def test_a_plain_gradient_touches_all_rows():
    rows = Rows()
    oracles = [Oracle(table) for table in rows.tables]
    optimizer = torch.optim.AdamW(rows.parameters, **HYPER)
    whole = torch.randn(R, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for table, oracle in zip(rows.tables, oracles, strict=True):
        table.rows.grad = whole.clone()
        oracle.step(torch.arange(R), whole, **HYPER, decoupled=True)
    optimizer.step()
    assert_follows(rows, oracles)


# ---------------------------------------------------------------------- other optimizers


class Custom(torch.optim.AdamW):
    """May step by any rule."""


OTHERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "torch's Adafactor": lambda p: torch.optim.Adafactor(p),
    "transformers' Adafactor": lambda p: transformers.Adafactor(p),
    "Lion8bit": bitsandbytes("Lion8bit"),
    "Custom": lambda p: Custom(p, lr=0.1),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_optimizer_is_refused_before_anything_moves(name):
    rows = Rows()
    optimizer = OTHERS[name](rows.parameters)
    rows.give(0)
    before, kind = rows.state(), type(optimizer).__name__
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"{kind} is neither.*meft\.RowAdamW.*row_optimizer=dict\(lr") as caught:
            optimizer.step()
        assert str(caught.value).count(". ") == 0  # one sentence
    assert_same_bits(before, rows.state())
    assert not optimizer.state
    assert all(table.moments is None for table in rows.tables)
    assert isinstance(rows.keys.rows.grad, RowGradient)
    able = torch.optim.AdamW(rows.parameters, lr=0.1)
    able.step()  # and it can go on with one that will do
    assert able.state[rows.keys.rows]["step"] == 1


def test_another_optimizer_with_a_closure_is_refused_before_anything_moves():
    rows = Rows()
    optimizer, called = torch.optim.LBFGS(rows.parameters), []
    before = rows.state()
    with pytest.raises(ValueError, match="LBFGS is neither"):
        optimizer.step(lambda: called.append(1))
    assert called == []
    assert_same_bits(before, rows.state())


@pytest.mark.parametrize("name", ["SGD", "torch's Adafactor", "Custom"])
def test_with_a_learning_rate_of_their_own_rows_train_under_any_optimizer(name):
    rows = Rows(row_optimizer={"lr": 2e-2, "betas": [0.7, 0.9]})
    oracles = [Oracle(table) for table in rows.tables]
    alone = nn.Parameter(rows.router.detach().clone())
    optimizer, plain = OTHERS[name](rows.parameters), OTHERS[name]([alone])
    for step in range(4):
        rows.clear()
        rows.give(step)
        alone.grad = rows.router.grad.clone()
        optimizer.step()
        plain.step()
        for i, oracle in enumerate(oracles):  # neither SGD's weight decay nor its lr
            oracle.step(*touched(step, i), lr=2e-2, betas=(0.7, 0.9), eps=1e-8, weight_decay=0.0, decoupled=True)
    assert_follows(rows, oracles)
    assert torch.equal(rows.router, alone)
    assert all(optimizer.state[table.rows].keys() == {"step", "row_moments"} for table in rows.tables)


@pytest.mark.parametrize("given", [{"lr": 2e-2}, {"betas": (0.5, 0.6)}, {"eps": 1e-2}, {"weight_decay": 0.5}], ids=str)
def test_given_fields_replace_those_of_the_optimizer(given):
    for name in ("adamw", "adam"):
        rows = Rows(row_optimizer=given)
        oracles = [Oracle(table) for table in rows.tables]
        optimizer = ADAMS[name](rows.parameters, **HYPER)
        for step in range(3):
            rows.clear()
            rows.give(step)
            optimizer.step()
            for i, oracle in enumerate(oracles):
                oracle.step(*touched(step, i), **HYPER | given, decoupled=name == "adamw")
        assert_follows(rows, oracles)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RowAdamW"])
def test_a_step_with_a_closure(name):
    rows = Rows(row_optimizer={"lr": 2e-2} if name == "SGD" else None)
    oracles = [Oracle(table) for table in rows.tables]
    kind = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW, "RowAdamW": RowAdamW}[name]
    optimizer = kind(rows.parameters, lr=2e-2, weight_decay=0.0)
    for step in range(3):

        def closure(step=step):
            rows.clear()
            rows.give(step)
            return torch.tensor(7.0)

        assert optimizer.step(closure) == 7.0
        for i, oracle in enumerate(oracles):
            oracle.step(*touched(step, i), lr=2e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled=True)
        assert_follows(rows, oracles)


def test_an_optimizer_that_calls_its_closure_often_steps_rows_once():
    rows = Rows(row_optimizer={"lr": 2e-2})
    optimizer, called = torch.optim.LBFGS(rows.parameters, lr=0.1, max_iter=4), []

    def closure():
        rows.clear()
        rows.give(0)
        called.append(1)
        return rows.router.square().sum()

    optimizer.step(closure)
    assert len(called) > 1
    assert [optimizer.state[table.rows]["step"] for table in rows.tables] == [1, 1]
    assert max(int(table.moments.counts.max()) for table in rows.tables) == 1


# ---------------------------------------------------------------------- accumulation, clipping, skipped steps


@pytest.mark.parametrize("make", [torch.optim.AdamW, RowAdamW, pytest.param(bitsandbytes("AdamW8bit"), id="AdamW8bit")])
@pytest.mark.parametrize("to_none", [True, False])
def test_accumulated_gradients_make_one_step(make, to_none):
    rows = Rows()
    oracles = [Oracle(table) for table in rows.tables]
    optimizer = make(rows.parameters, **HYPER)
    for step in range(3):
        rows.give(2 * step)
        rows.give(2 * step + 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)
        for i, oracle in enumerate(oracles):
            total = torch.zeros(R, D, dtype=torch.float64)
            index = [touched(2 * step + k, i) for k in (0, 1)]
            for where, grads in index:
                total[where] += grads
            where = torch.cat([where for where, _ in index]).unique()
            oracle.step(where, total[where], **HYPER, decoupled=True)
    assert_follows(rows, oracles)


def test_after_zero_grad_to_zeros_a_step_moves_no_row():
    for make in (torch.optim.AdamW, RowAdamW):
        rows = Rows()
        optimizer = make(rows.parameters, **HYPER)
        rows.give(0)
        optimizer.step()
        rows.give(1)
        optimizer.zero_grad(set_to_none=False)
        before = rows.state()[:2]
        optimizer.step()
        assert_same_bits(before, rows.state()[:2])


@pytest.mark.parametrize("name", [*ADAMS, "RowAdamW"])
@pytest.mark.parametrize("where", ["keys", "values", "router"])
def test_a_gradient_that_is_not_finite_skips_the_whole_step(name, where):
    rows = Rows()
    optimizer = (RowAdamW if name == "RowAdamW" else ADAMS[name])(rows.parameters, **HYPER)
    rows.give(0)
    optimizer.step()
    before, router_state = rows.state(), copy.deepcopy(optimizer.state.get(rows.router))
    for count, bad in enumerate((torch.inf, torch.nan), 1):
        rows.clear()
        rows.give(1)
        hit = rows.router.grad if where == "router" else getattr(rows, where).rows.grad.row_values
        hit[-1, -1] = bad
        if count == 1:
            with pytest.warns(UserWarning, match="inf or nan: this optimizer step changes nothing"):
                optimizer.step()
        else:
            optimizer.step()
        assert_same_bits(before, rows.state())
        assert rows.steps.nonfinite_steps == count
    after = optimizer.state.get(rows.router) or {}
    for key, value in (router_state or {}).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, after[key]), key
    rows.clear()
    rows.give(1)
    optimizer.step()
    assert optimizer.state[rows.keys.rows]["step"] == 2


SCALED = {
    "adamw": torch.optim.AdamW,
    "adamw fused": ADAMS["adamw fused"],
    "RowAdamW": RowAdamW,
    "bitsandbytes": bitsandbytes("AdamW8bit"),
}


@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscaled first"])
@pytest.mark.parametrize("name", SCALED)
def test_scaled_gradients_make_the_same_step(name, unscale):
    plain, scaled = Rows(torch.float32), Rows(torch.float32)
    optimizers = [SCALED[name](rows.parameters, **HYPER) for rows in (plain, scaled)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    scaler.scale(torch.ones(()))
    for step in range(3):
        plain.clear()
        plain.give(step)
        optimizers[0].step()
        scaled.clear()
        scaled.give(step, scale=2.0**8)
        if unscale:
            scaler.unscale_(optimizers[1])
        scaler.step(optimizers[1])
        scaler.update()
    assert_same_bits(plain.state()[:2], scaled.state()[:2])  # powers of two: exact
    torch.testing.assert_close(plain.router, scaled.router, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("where", ["keys", "router"])
@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscaled first"])
@pytest.mark.parametrize("name", SCALED)
def test_a_step_that_the_scaler_skips_changes_nothing(name, unscale, where):
    rows = Rows(torch.float32)
    optimizer = SCALED[name](rows.parameters, **HYPER)
    rows.give(0)
    optimizer.step()
    rows.clear()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    scaler.scale(torch.ones(()))
    rows.give(1, scale=2.0**8)
    hit = rows.router.grad if where == "router" else rows.keys.rows.grad.row_values
    hit[0, 0] = torch.inf
    before = rows.state()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**7
    assert_same_bits(before, rows.state())
    assert all(optimizer.state[table.rows]["step"] == 1 for table in rows.tables)
    rows.clear()
    rows.give(1, scale=2.0**7)
    scaler.step(optimizer)
    assert optimizer.state[rows.keys.rows]["step"] == 2


# ---------------------------------------------------------------------- RowAdamW


def test_row_adamw_trains_rows_by_the_lazy_rule_and_the_hook_leaves_them_alone():
    rows = Rows(row_optimizer={"lr": 5.0})  # would be seen
    oracles = [Oracle(table) for table in rows.tables]
    optimizer = RowAdamW(rows.parameters, **HYPER)
    for step in range(5):
        rows.clear()
        rows.give(step)
        optimizer.step()
        for i, oracle in enumerate(oracles):
            oracle.step(*touched(step, i), **HYPER, decoupled=True)
        assert_follows(rows, oracles)
        assert isinstance(rows.keys.rows.grad, RowGradient)  # as with any optimizer of torch


def test_row_adamw_equals_stock_adamw_bit_for_bit():
    stock, own = Rows(torch.float32), Rows(torch.float32)
    optimizers = [torch.optim.AdamW(stock.parameters, **HYPER), RowAdamW(own.parameters, **HYPER)]
    for step in range(5):
        for rows, optimizer in zip((stock, own), optimizers, strict=True):
            rows.clear()
            rows.give(step)
            optimizer.step()
    keep = [i for i in range(len(stock.state())) if i != 2]  # not the router, whose order of operations is torch's
    before, after = stock.state(), own.state()
    assert_same_bits([before[i] for i in keep], [after[i] for i in keep])


def test_row_adamw_treats_other_parameters_as_torchs_adamw():
    shapes = [(3, 4), (5,), (), (2, 3, 4), (1, 1)]
    generator = torch.Generator().manual_seed(0)
    ours = [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    idle = nn.Parameter(torch.ones(2))
    optimizers = [RowAdamW([*ours, idle], **HYPER), torch.optim.AdamW(theirs, **HYPER)]
    for _ in range(20):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator, dtype=torch.float64)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)
    assert torch.equal(idle, torch.ones(2))


@pytest.mark.parametrize(
    "made",
    [
        lambda g: torch.randn(3, 4, generator=g, dtype=torch.float64).T,
        lambda g: torch.randn(2, 3, 4, 4, generator=g, dtype=torch.float64).to(memory_format=torch.channels_last),
        lambda g: torch.zeros(0, 4, dtype=torch.float64),
    ],
    ids=["transposed", "channels last", "empty"],
)
def test_row_adamw_takes_other_parameters_of_any_layout(made):
    generator = torch.Generator().manual_seed(0)
    ours = nn.Parameter(made(generator))
    theirs = nn.Parameter(ours.detach().clone())
    for _ in range(3):
        ours.grad = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
        theirs.grad = ours.grad.clone()
        RowAdamW([ours], **HYPER).step()
        torch.optim.AdamW([theirs], **HYPER).step()
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0 must be at least 0"),
        ({"eps": -1.0}, "eps=-1.0 must be at least 0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must be at least 0"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) must be in \[0, 1\)"),
    ],
)
def test_row_adamw_refuses_wrong_arguments(given, message):
    with pytest.raises(ValueError, match=message):
        RowAdamW([nn.Parameter(torch.ones(1))], **given)


def test_a_table_in_two_row_adamws_is_an_error():
    rows = Rows()
    first = RowAdamW([rows.keys.rows])
    with pytest.raises(ValueError, match="in two optimizers"):
        RowAdamW(rows.parameters)
    second = RowAdamW([rows.values.rows])
    with pytest.raises(ValueError, match="in two optimizers"):
        second.add_param_group({"params": [rows.keys.rows]})
    assert len(second.param_groups) == 1  # as before
    del first
    gc.collect()
    second.add_param_group({"params": [rows.keys.rows]})  # the first one is gone


def test_a_table_in_row_adamw_and_a_stock_optimizer_is_an_error_before_anything_moves():
    rows = Rows()
    for order in (0, 1):
        makers = [lambda: RowAdamW(rows.parameters), lambda: torch.optim.AdamW(rows.parameters, lr=0.1)]
        made = [makers[order](), makers[1 - order]()]
        stock = next(o for o in made if isinstance(o, torch.optim.AdamW))
        rows.give(0)
        before = rows.state()
        with pytest.raises(ValueError, match=r"in two optimizers, a meft\.RowAdamW and another one"):
            stock.step()
        assert_same_bits(before, rows.state())
        assert not stock.state
        del made, stock
        gc.collect()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_state_dict_continues_bit_for_bit(dtype):
    rows = Rows(dtype)
    optimizer = RowAdamW(rows.parameters, **HYPER)

    def train(rows, optimizer, steps):
        for step in steps:
            rows.clear()
            rows.give(step)
            optimizer.step()

    train(rows, optimizer, range(4))
    tables = [copy.deepcopy(table.state_dict()) for table in rows.tables]  # current, as a saved model is
    saved = copy.deepcopy(optimizer.state_dict())
    other = Rows(dtype)
    with torch.no_grad():
        other.router.copy_(rows.router)
    for table, state in zip(other.tables, tables, strict=True):
        table.load_state_dict(state)
    second = RowAdamW(other.parameters, lr=9.0)
    second.load_state_dict(saved)
    train(rows, optimizer, range(4, 8))
    train(other, second, range(4, 8))
    assert_same_bits(rows.state(), other.state())


def test_a_state_that_does_not_fit_is_refused_and_nothing_is_loaded():
    rows, other = Rows(), nn.Parameter(torch.ones(3, D))
    optimizer = RowAdamW(rows.parameters, **HYPER)
    rows.give(0)
    optimizer.step()
    saved = optimizer.state_dict()
    second = RowAdamW([other], lr=0.5)
    with pytest.raises(ValueError, match="doesn't match the size"):
        second.load_state_dict(saved)
    assert second.param_groups[0]["lr"] == 0.5
    assert not second.state


# ---------------------------------------------------------------------- whole models


SIZES = {"r": 32, "num_experts": 8, "experts_per_token": 2, "top_k": 3, "init_weights": False}


def adapted(dtype=torch.float64, **fields):
    return get_peft_model(
        llama(dtype=dtype, num_key_value_heads=2), MEFTConfig(**SIZES | {"master_dtype": "float64"} | fields)
    )


class DenseFFN(nn.Module):
    """The same adapter by plain parameters and the oracle."""

    def __init__(self, layer):
        super().__init__()
        self.ffn = layer.base_layer
        config = layer.configs["default"]
        self.fields = {"experts_per_token": config.probed, "top_k": config.top_k, "router_factor": config.router_factor}
        tables = [table.rows for table in layer.tables("default")]
        self.keys, self.values, self.router = (
            nn.Parameter(p.detach().clone()) for p in (*tables, layer.router("default"))
        )

    def forward(self, x):
        y = reference(x.reshape(-1, x.shape[-1]), self.router, self.keys, self.values, **self.fields)
        return self.ffn(x) + y.view(x.shape)


def dense_twin(model):
    """The same model with dense parameters, and these in the order of `trainable`."""
    twin = llama(dtype=model.get_base_model().dtype, num_key_value_heads=2)
    twin.load_state_dict(
        {k.replace(".base_layer", ""): v for k, v in model.get_base_model().state_dict().items() if "meft_" not in k}
    )
    twin.requires_grad_(False)
    ours = [m for m in model.modules() if isinstance(m, MEFTLayer)]
    for block, layer in zip(twin.model.layers, ours, strict=True):
        block.mlp = DenseFFN(layer)
        block.mlp.ffn = copy.deepcopy(layer.base_layer)
    return twin, [p for block in twin.model.layers for p in (block.mlp.keys, block.mlp.values, block.mlp.router)]


def trainable(model):
    layers = [m for m in model.modules() if isinstance(m, MEFTLayer)]
    return [p for m in layers for p in (*(t.rows for t in m.tables("default")), m.router("default"))]


def loss_of(model, seed, rows=1, length=4):
    ids = torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))
    logits = model(input_ids=ids).logits
    return nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 64), ids[:, 1:].reshape(-1))


def test_the_dense_twin_has_the_same_loss_and_gradients():
    model = adapted()
    twin, dense = dense_twin(model)
    losses = [loss_of(m, 1) for m in (model, twin)]
    torch.testing.assert_close(*losses, rtol=1e-13, atol=0)
    for loss in losses:
        loss.backward()
    for ours, theirs in zip(trainable(model), dense, strict=True):
        ours = ours.grad.to_dense() if isinstance(ours.grad, RowGradient) else ours.grad
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_clipping_a_model_equals_clipping_its_dense_twin(norm_type):
    model = adapted()
    twin, dense = dense_twin(model)
    norms = []
    for m, parameters in ((model, trainable(model)), (twin, dense)):
        loss_of(m, 1).backward()
        loss_of(m, 2).backward()
        norms.append(nn.utils.clip_grad_norm_(parameters, 1e-3, norm_type))
    assert norms[0] > 1e-3
    torch.testing.assert_close(*norms, rtol=1e-12, atol=0)
    for a, b in zip(trainable(model), dense, strict=True):
        ours = a.grad.to_dense() if isinstance(a.grad, RowGradient) else a.grad
        torch.testing.assert_close(ours, b.grad, rtol=1e-10, atol=1e-16)


def test_micro_batches_make_the_step_of_the_whole_batch():
    models = [adapted(), adapted()]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in models]
    for step in range(3):
        for k in range(4):
            (loss_of(models[0], 4 * step + k) / 4).backward()
        (sum(loss_of(models[1], 4 * step + k) for k in range(4)) / 4).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    for a, b in zip(trainable(models[0]), trainable(models[1]), strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("master", ["float32", "bfloat16"])
def test_a_float64_model_with_narrower_masters_trains(master):
    model = adapted(master_dtype=master)
    before = [p.detach().clone() for p in trainable(model)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss_of(model, 1).backward()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, trainable(model), strict=True))


@pytest.mark.parametrize(
    ("base", "compute_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)],
)
def test_the_rows_that_are_read_follow_the_masters(base, compute_dtype):
    model = adapted(base, master_dtype="float32")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        for layer in (m for m in model.modules() if isinstance(m, MEFTLayer)):
            for table in layer.tables("default"):
                with table.reading() as rows:
                    assert rows.dtype == compute_dtype
                    assert torch.equal(rows, table.rows.detach().to(compute_dtype))


def test_removing_an_adapter_ends_its_steps():
    model = adapted()
    rows = trainable(model)[0]
    optimizer = torch.optim.AdamW([rows], lr=1e-2)
    loss_of(model, 1).backward()
    optimizer.step()
    assert len(model.base_model.steps.tables["default"]) == 4
    model.delete_adapter("default")
    assert model.base_model.steps.tables == {}
