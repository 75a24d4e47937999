"""Checks of row_adamw, for any implementation of it."""

from __future__ import annotations

import torch
from torch import Tensor

from adapter_kernels import RowState, StepRule
from adapter_kernels.adamw import naive
from tests.support.kernels.kernel_checks import EPS, Fenced
from tests.support.kernels.row_checks import same_bits
from tests.support.kernels.selection_checks import generator

RULE = {"lr": 1e-2, "eps": 1e-8, "weight_decay": 0.1}  # but for betas


class Tables:
    """A table with its moments, counts and perhaps a compute copy, between fences; some rows were touched before."""

    def __init__(self, r, d, dtype=torch.float32, *, compute_dtype=None, seed=0):
        g = generator(seed)
        wide = torch.promote_types(dtype, torch.float32)
        self.fenced = {
            "table": Fenced((r, d), dtype),
            "exp_avg": Fenced((r, d), wide),
            "exp_avg_sq": Fenced((r, d), wide),
            "counts": Fenced((r,), torch.int32),
        }
        if compute_dtype is not None:
            self.fenced["compute_copy"] = Fenced((r, d), compute_dtype)
        touched = torch.randint(0, 4, (r,), generator=g)
        self["table"].copy_(torch.randn(r, d, generator=g))
        self["exp_avg"].copy_(0.1 * torch.randn(r, d, generator=g) * (touched > 0)[:, None])
        self["exp_avg_sq"].copy_(0.1 * torch.rand(r, d, generator=g) * (touched > 0)[:, None])
        self["counts"].copy_(touched)
        if compute_dtype is not None:
            self["compute_copy"].copy_(self["table"])

    def __getitem__(self, name: str) -> Tensor:
        return self.fenced[name].tensor

    @property
    def state(self) -> RowState:
        return RowState(**{name: fenced.tensor for name, fenced in self.fenced.items()})

    def step(self, op, rows, grads, *, betas=(0.9, 0.999), seed=0, decoupled=True) -> None:
        op(self.state, rows, grads, StepRule(**RULE, beta1=betas[0], beta2=betas[1], decoupled=decoupled), seed=seed)


def check_adamw(op, tables: Tables, rows: Tensor, grads: Tensor, *, betas=(0.9, 0.999), decoupled=True) -> None:
    """Touched rows within rounding of the oracle, all else bit by bit."""
    before = {name: tables[name].clone() for name in tables.fenced}
    tables.step(op, rows, grads, betas=betas, decoupled=decoupled)
    untouched = torch.ones(len(before["table"]), dtype=torch.bool)
    untouched[rows.long()] = False
    for name, fenced in tables.fenced.items():
        assert fenced.intact(), f"a kernel wrote outside of {name}"
        if name != "counts":
            assert same_bits(tables[name][untouched], before[name][untouched]), f"another row of {name} has changed"
    assert torch.equal(tables["counts"], before["counts"] + (~untouched).int())
    old = {name: x.double() for name, x in before.items()}
    for i, grad in zip(rows.tolist(), grads.double(), strict=True):
        touches = int(before["counts"][i]) + 1
        state = (old["table"][i], old["exp_avg"][i], old["exp_avg_sq"][i])
        rule = (RULE["lr"], betas, RULE["eps"], RULE["weight_decay"], decoupled)
        oracle = naive.row_adamw(*state, touches, grad, *rule)
        size = grad.abs() + (0 if decoupled else RULE["weight_decay"] * state[0].abs())
        sizes = (state[0].abs() + RULE["lr"] * 10, state[1].abs() + size, oracle[2] + (0 if decoupled else size**2))
        for name, exact, size in zip(("table", "exp_avg", "exp_avg_sq"), oracle, sizes, strict=True):
            out = tables[name][i]
            # Stochastic rounding goes to one of the neighbours: two halves of a unit in the last place.
            eps = 2 * EPS[out.dtype] if out.dtype in EPS else 2.0**-53
            error = (out.double() - exact).abs()
            assert bool((error <= 4 * eps * exact.abs() + 8 * EPS[torch.float32] * size).all()), f"{name}, row {i}"
        if "compute_copy" in tables.fenced:
            assert same_bits(tables["compute_copy"][i], tables["table"][i].to(tables["compute_copy"].dtype))
