"""Checks of shared_lora, forward and backward, for any implementation of it."""

from __future__ import annotations

import torch
from kernel_checks import EPS, IN_NORM, LAYOUTS
from selection_checks import generator
from torch import Tensor

from adapter_kernels import reference

SCALING = 1.7


class Case:
    """Arguments of shared_lora; `out` has the columns of each projection."""

    def __init__(self, T, d, r, out, dtype=torch.float32, *, layout="contiguous", seed=0):
        g = generator(seed)

        def values(*shape):
            return LAYOUTS[layout](torch.randn(*shape, generator=g).to(dtype))

        self.leaves = {"x": values(T, d), "A": values(r, d)}
        self.grads = []
        for i, columns in enumerate(out):
            self.leaves |= {f"base{i}": values(T, columns), f"B{i}": values(columns, r)}
            self.grads.append(values(T, columns))

    def run(self, op, wide=False) -> dict[str, Tensor]:
        """The outputs and gradients by name."""
        tensors = {name: (x.double() if wide else x).detach().requires_grad_() for name, x in self.leaves.items()}
        pairs = [(tensors[f"base{i}"], tensors[f"B{i}"]) for i in range(len(self.grads))]
        out = op(tensors["x"], tensors["A"], pairs, SCALING)
        torch.autograd.backward(out, [g.to(y.dtype) for y, g in zip(out, self.grads, strict=True)])
        return {f"y{i}": y.detach() for i, y in enumerate(out)} | {f"d{name}": x.grad for name, x in tensors.items()}

    def magnitudes(self) -> dict[str, Tensor]:
        """The same of absolute values: what the rounding of the sums is proportional to."""
        size = Case.__new__(Case)
        size.leaves = {name: x.double().abs() for name, x in self.leaves.items()}
        size.grads = [g.double().abs() for g in self.grads]
        return size.run(oracle)


def oracle(x, A, pairs, scaling):
    return [reference.shared_lora(x, A, base, B, scaling) for base, B in pairs]


def check_lora(op, case: Case) -> None:
    """Each output and gradient: in norm, and each element by its own bound."""
    outputs, exact, sizes = case.run(op), case.run(oracle, wide=True), case.magnitudes()
    x, terms = case.leaves["x"], sum(max(t.shape) for t in case.leaves.values())
    # One sum follows another; between them a value, and scaled also the kept h, is rounded to the narrow dtype.
    rounding = 4 * terms**0.5 * EPS[torch.float32] + (3 * EPS[x.dtype] if x.dtype in EPS else 0)
    for name, out in outputs.items():
        assert not out.isnan().any(), f"{name}: something was not written"
        error = (out.double() - exact[name]).abs()
        limit = 4 * EPS.get(out.dtype, 0.0) * exact[name].abs() + rounding * sizes[name]
        assert bool((error <= limit).all()), f"{name}: {int((error > limit).sum())} elements past their bounds"
        norm = exact[name].norm()
        assert error.norm() <= IN_NORM.get(out.dtype, 1e-12) * norm, f"{name}: in norm {error.norm() / norm:.1e}"
