"""Checks of sparse_ffn, forward and backward, for any implementation of it."""

from __future__ import annotations

import torch
from torch import Tensor

from adapter_kernels import sparse_ffn_backward
from adapter_kernels.ffn import naive
from tests.support.kernels.kernel_checks import EPS, IN_NORM, LAYOUTS, in_poison
from tests.support.kernels.selection_checks import generator


class Case:
    """Arguments of sparse_ffn: distinct rows in random order in each token, some of them none."""

    def __init__(
        self,
        T,
        d,
        U,
        K,
        dtype=torch.float32,
        *,
        factor=True,
        base=True,
        layout="contiguous",
        none=0.2,
        seed=0,
        narrow=False,
    ):
        g = generator(seed)

        def values(*shape):
            return torch.randn(*shape, generator=g).to(dtype)

        self.x, self.g = LAYOUTS[layout](values(T, d)), LAYOUTS[layout](values(T, d))
        self.base = LAYOUTS[layout](values(T, d)) if base else None
        self.keys, self.values = in_poison(values(U, d)), in_poison(values(U, d))
        self.position = torch.rand(T, max(U, K), generator=g).argsort(1)[:, :K].to(torch.int32)
        self.position[(torch.rand(T, K, generator=g) < none) | (self.position >= U)] = -1
        # Not small, so that no score's sign is within rounding of another.
        size = 0.5 + torch.rand(T, K, generator=g)
        self.factors = torch.where(torch.rand(T, K, generator=g) < 0.5, size, -size) if factor else None
        if narrow and factor:
            self.factors = self.factors.to(dtype)
        self.narrow = EPS.get(dtype, 0.0)

    def run(self, op) -> tuple[Tensor, dict[str, Tensor]]:
        """y and the gradients by name."""
        names = ["x", "keys", "values", "factors", "base"]
        leaves = {n: getattr(self, n).detach().requires_grad_() for n in names if getattr(self, n) is not None}
        y = op(
            leaves["x"], leaves["keys"], leaves["values"], self.position, leaves.get("factors"), base=leaves.get("base")
        )
        y.backward(self.g)
        return y.detach(), {name: leaf.grad for name, leaf in leaves.items()}

    def oracle(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The same in float64."""
        wide = Case.__new__(Case)
        for name, value in vars(self).items():
            is_float = isinstance(value, Tensor) and value.is_floating_point()
            setattr(wide, name, value.double() if is_float else value)

        def op(x, keys, values, position, factors, base):
            y = naive.sparse_ffn(x, keys, values, position, factors)
            return y if base is None else y + base

        return wide.run(op)

    def magnitudes(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Sums of what was added up, by absolute value: |x| . |w| and so on through both layers."""
        T, U = len(self.x), len(self.keys)
        x, g, keys, values = (t.double().abs() for t in (self.x, self.g, self.keys, self.values))
        c = (
            torch.ones(self.position.shape, dtype=torch.float64)
            if self.factors is None
            else self.factors.double().abs()
        )
        live, place = self.position >= 0, self.position.clamp(min=0).long()
        c = torch.zeros(T, U, dtype=torch.float64).scatter_add(1, place, c * live) if U else c.new_zeros(T, 0)
        active, ds = (x @ keys.T) * c, (g @ values.T) * (c > 0)
        y = active @ values + (0 if self.base is None else self.base.double().abs())
        grads = {"x": (ds * c) @ keys, "keys": (ds * c).T @ x, "values": active.T @ g, "base": g}
        if self.factors is not None:
            grads["factors"] = ((x @ keys.T) * ds).gather(1, place) * live if U else live.double()
        return y, grads


def check_ffn(op, case: Case) -> None:
    """y and each gradient: in norm, and each element by its own bound."""
    (y, grads), (oracle, oracles), (magnitude, magnitudes) = case.run(op), case.oracle(), case.magnitudes()
    outputs = {"y": (y, oracle, magnitude)} | {n: (grads[n], oracles[n], magnitudes[n]) for n in grads}
    # Two sums follow each other; between them a value is rounded once to the narrow dtype, and so are factors.
    terms = 4 * (case.x.shape[1] + len(case.keys) + len(case.x)) ** 0.5 * EPS[torch.float32]
    for name, (out, exact, size) in outputs.items():
        assert not out.isnan().any(), f"{name}: something was not written"
        assert out.shape == exact.shape
        eps = EPS.get(out.dtype, 0.0)
        error = (out.double() - exact).abs()
        limit = 4 * eps * exact.abs() + (terms + 2 * case.narrow) * size
        assert bool((error <= limit).all()), f"{name}: {int((error > limit).sum())} elements past their bounds"
        assert error.norm() <= IN_NORM.get(out.dtype, 1e-12) * exact.norm(), (
            f"{name}: relative error in norm {error.norm() / exact.norm():.1e}"
        )


def check_wide_row_gradients(impl, case: Case, backward=sparse_ffn_backward) -> None:
    """Sums that half precision cannot hold, of integers that it can, are those of float64 in float32, and not without.

    `case` gets these integers. It needs 24 to 32 columns and 200 tokens or more, each with most of the rows.
    """
    for name, size in (("x", 8), ("g", 8), ("values", 1)):
        tensor = getattr(case, name)
        tensor.copy_((2 * tensor.float().abs()).round().clamp(max=size))
    case.keys.copy_(case.keys.float().sign())
    if case.factors is not None:
        case.factors.copy_(torch.where(case.factors.abs() > 1, 2, 1))
    arguments = (case.g, case.x, case.keys, case.values, case.position, case.factors)
    _, dkeys, dvalues, _ = backward(*arguments, row_gradients=torch.float32, impl=impl)
    _, narrow_dkeys, narrow_dvalues, _ = backward(*arguments, impl=impl)
    _, oracles = case.oracle()
    for name, wide, narrow in (("keys", dkeys, narrow_dkeys), ("values", dvalues, narrow_dvalues)):
        assert (wide.dtype, narrow.dtype) == (torch.float32, case.x.dtype)
        assert torch.equal(wide.double(), oracles[name]), f"{name}: rounded, or wrong"
        assert not torch.equal(narrow.double(), oracles[name]), f"{name}: the case tells nothing"
