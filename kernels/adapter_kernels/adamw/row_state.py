"""What a step of rows reads and writes, and the rule of the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime import dispatch


class RowState(NamedTuple):
    """A table of rows and what an optimizer keeps for each of them. A step changes the touched rows of all tensors.

    All tensors are contiguous and on one device.

    Attributes:
        table: [r, d] float32, bfloat16 or float64, the rows that are trained.
        exp_avg, exp_avg_sq: [r, d] float32, or float64 if the table is: the moments.
        counts: int32 [r], how often each row was touched.
        compute_copy: [r, d] float16 or bfloat16 (also float32 of a float64 table): a copy of the table that the
            computation reads, rounded to the nearest; None: the computation reads the table.
    """

    table: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    counts: Tensor
    compute_copy: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All tensors, without a compute copy that is None."""
        return [tensor for tensor in self if tensor is not None]

    def row_bytes(self) -> int:
        """Bytes that a step of one row reads and writes, without its gradient; the compute copy is only written."""
        return sum(tensor[:1].nbytes * (1 if tensor is self.compute_copy else 2) for tensor in self.tensors())

    def check(self) -> None:
        """Raises: ValueError: dtypes, shapes or devices that do not fit together, or a tensor is not contiguous."""
        table = self.table
        dispatch.require_matrix(table, "table", (torch.float32, torch.bfloat16))
        wide = torch.promote_types(table.dtype, torch.float32)
        dtypes = {"table": (table.dtype,), "exp_avg": (wide,), "exp_avg_sq": (wide,), "counts": (torch.int32,)}
        if self.compute_copy is not None:
            dispatch.require(table.dtype != torch.bfloat16, "compute_copy", "a bfloat16 table has none; pass None")
            double = (torch.float32,) if wide == torch.float64 else ()
            dtypes["compute_copy"] = (torch.float16, torch.bfloat16, *double)
        # No message is made up before it is needed: tables can be small.
        for name, known in dtypes.items():
            tensor, shape = getattr(self, name), table.shape[:1] if name == "counts" else table.shape
            if tensor.dtype not in known:
                dispatch.require(False, name, f"one of {', '.join(map(str, known))} is needed, not {tensor.dtype}")
            if tensor.shape != shape:
                dispatch.require(False, name, f"the shape {tuple(shape)} is needed, not {tuple(tensor.shape)}")
            if tensor.device != table.device:
                dispatch.require(False, name, f"is on {tensor.device}, but table is on {table.device}")
            dispatch.require(tensor.is_contiguous(), name, "a contiguous tensor is needed")


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

    @property
    def mix(self) -> float:
        """The factor of (gradient - old moment) that is added to the one that `from_grad` chooses."""
        return -self.beta1 if self.from_grad else 1 - self.beta1
