"""What a step of rows reads and writes, and the rule of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime import dispatch
from .moment_layout import mode_of, moment_forms


class RowState(NamedTuple):
    """A table of rows and what an optimizer keeps for each of them. A step changes the touched rows of all tensors.

    All tensors are contiguous and on one device.

    Attributes:
        table: [r, d] float32, bfloat16 or float64, the rows that are trained.
        exp_avg, exp_avg_sq: the moments, in one of the modes of `moment_layout`.
        counts: int32 [r], how often each row was touched.
        compute_copy: [r, d] float16 or bfloat16 (also float32 of a float64 table): a copy of the table that the
            computation reads, rounded to the nearest; None: the computation reads the table.
        exp_avg_scale, exp_avg_sq_scale: of moments in mode "float8".
    """

    table: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    counts: Tensor
    compute_copy: Tensor | None = None
    exp_avg_scale: Tensor | None = None
    exp_avg_sq_scale: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All tensors, without those that are None."""
        return [tensor for tensor in self if tensor is not None]

    @property
    def mode(self) -> str:
        """How the moments are kept: one of `moment_layout.MODES`."""
        return mode_of(self.exp_avg_sq)

    def row_bytes(self) -> int:
        """Bytes that a step of one row reads and writes, without its gradient; the compute copy is only written."""
        return sum(tensor[:1].nbytes * (1 if tensor is self.compute_copy else 2) for tensor in self.tensors())

    def check(self) -> None:
        """Raises: ValueError: dtypes, shapes or devices that do not fit together, or a tensor is not contiguous."""
        table, copy = self.table, self.compute_copy
        dispatch.require_matrix(table, "table", (torch.float32, torch.bfloat16))
        double, mode = table.dtype == torch.float64, self.mode
        if double and mode != "float32":
            dispatch.require(False, "exp_avg_sq", f"a float64 table has no moments in mode {mode!r}")
        expected: list[tuple[str, Tensor, tuple[torch.dtype, ...], tuple[int, ...]]]
        expected = [("table", table, (table.dtype,), table.shape)]
        forms = moment_forms(mode, table.shape, table.dtype)
        for name, (shape, dtype) in forms.items():
            tensor = getattr(self, name)
            if tensor is None:
                dispatch.require(False, name, f"moments in mode {mode!r} need it")
            expected.append((name, tensor, (dtype,), shape))
        if copy is not None:
            dispatch.require(table.dtype != torch.bfloat16, "compute_copy", "a bfloat16 table has none; pass None")
            narrow = (torch.float16, torch.bfloat16, torch.float32) if double else (torch.float16, torch.bfloat16)
            expected.append(("compute_copy", copy, narrow, table.shape))
        # No message is made up before it is needed: steps can be small.
        for name, tensor, dtypes, size in expected:
            if tensor.dtype not in dtypes:
                dispatch.require(False, name, f"one of {', '.join(map(str, dtypes))} is needed, not {tensor.dtype}")
            if tensor.shape != size:
                dispatch.require(False, name, f"the shape {tuple(size)} is needed, not {tuple(tensor.shape)}")
            if tensor.device != table.device:
                dispatch.require(False, name, f"is on {tensor.device}, but table is on {table.device}")
            if not tensor.is_contiguous():
                dispatch.require(False, name, "a contiguous tensor is needed")


class Corrections(NamedTuple):
    """What a step takes of the count of touches n of each of its rows, float64 [k].

    Attributes:
        step_size: lr / (1 - beta1^n).
        root2, inverse2: sqrt(1 - beta2^n), and one over it.
        limit: the largest change of a value by moments that are exact, whatever its gradients (Cauchy-Schwarz).
    """

    step_size: Tensor
    root2: Tensor
    inverse2: Tensor
    limit: Tensor

    def part(self, rows: slice) -> Corrections:
        """Of some of the rows."""
        return Corrections(*(x[rows] for x in self))


@dataclass(frozen=True)
class StepRule:
    """The hyper-parameters of one optimizer step, as torch.optim.AdamW (`decoupled`) or Adam takes them."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = True

    def check(self) -> None:
        """Raises: ValueError: a value is out of range."""
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            dispatch.require(False, "betas", f"from 0 to below 1 are needed, not {(self.beta1, self.beta2)}")
        if min(self.lr, self.eps, self.weight_decay) < 0:
            values = self.lr, self.eps, self.weight_decay
            dispatch.require(False, "lr, eps and weight_decay", f"they must not be negative, but are {values}")

    @property
    def decay(self) -> float:
        """The factor of decoupled weight decay; 1.0 without it."""
        return 1 - self.lr * self.weight_decay if self.decoupled else 1.0

    @property
    def coupled(self) -> float:
        """The weight decay that is added to the gradient; 0.0 if it is decoupled."""
        return 0.0 if self.decoupled else self.weight_decay

    @property
    def from_grad(self) -> bool:
        """Whether the new first moment is computed from the gradient or from the old moment: torch.lerp's rule."""
        return 1 - self.beta1 >= 0.5

    def corrections(self, touches: Tensor) -> Corrections:
        """Of each row by its count of touches, integers [k] from 1."""
        n = touches.to(torch.float64)
        step_size, root2 = self.lr / (1 - self.beta1**n), (1 - self.beta2**n).sqrt()
        # m_n^2 <= (1 - beta1)^2 / (1 - beta2) * sum_(i < n) (beta1^2 / beta2)^i * v_n.
        ratio = self.beta1**2 / self.beta2 if self.beta2 else math.inf
        terms = n if ratio == 1 else (1 - ratio**n) / (1 - ratio) if self.beta2 else torch.full_like(n, math.inf)
        limit = step_size * root2 * ((1 - self.beta1) / (1 - self.beta2) ** 0.5) * terms.sqrt()
        return Corrections(step_size, root2, 1 / root2, limit.nan_to_num(math.inf, math.inf))  # 0 times infinity

    @property
    def mix(self) -> float:
        """The factor of (gradient - old moment) that is added to the one that `from_grad` chooses."""
        return -self.beta1 if self.from_grad else 1 - self.beta1
