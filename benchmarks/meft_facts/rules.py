"""Optimizers that step MEFT's rows as torch does, beside MEFT's own rule.

MEFT counts the touches of each row: a row that is not used keeps its moments, and its n-th use is corrected for n
steps. torch's SparseAdam leaves such a row alone too, and corrects all rows for the steps of the run. A dense AdamW
steps every row in every step, those that were not used by their moments.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def sparse(gradient: Tensor) -> Tensor:
    """A row gradient as a sparse tensor [r, d] with its touched rows."""
    return torch.sparse_coo_tensor(gradient.rows[None], gradient.row_values, gradient.shape, check_invariants=True)


RULES: dict[str, tuple[type[torch.optim.Optimizer], Callable[[Tensor], Tensor], dict]] = {
    "SparseAdam": (torch.optim.SparseAdam, sparse, {}),
    "dense AdamW": (torch.optim.AdamW, lambda gradient: gradient.to_dense(), {"weight_decay": 0.0}),
}


class RowsByTorch(torch.optim.Optimizer):
    """AdamW without weight decay, and one of torch's optimizers for MEFT's rows, on copies that are written back.

    Args:
        groups: as of any optimizer; a parameter whose gradient has `row_values` is one of MEFT's. Only copies of the
            parameters are in `param_groups`, since MEFT refuses rules for its rows that are not its own.
        rule: one of `RULES`.
    """

    def __init__(self, groups: Sequence[dict], rule: str) -> None:
        self._kind, self._form, self._fields = RULES[rule]
        self._of = {
            nn.Parameter(torch.clone(parameter.detach().as_subclass(Tensor))): parameter
            for group in groups
            for parameter in group["params"]
        }
        copies = {id(parameter): copied for copied, parameter in self._of.items()}
        super().__init__([group | {"params": [copies[id(p)] for p in group["params"]]} for group in groups], {})
        self._steppers: dict[nn.Parameter, torch.optim.Optimizer] = {}

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Step every parameter that has a gradient."""
        for group in self.param_groups:
            for copied in group["params"]:
                gradient = self._of[copied].grad
                if gradient is not None:
                    self._step(copied, gradient, group["lr"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of the parameters themselves."""
        for parameter in self._of.values():
            parameter.grad = None

    def _step(self, copied: nn.Parameter, gradient: Tensor, rate: float) -> None:
        of_rows = hasattr(gradient, "row_values")
        if copied not in self._steppers:
            kind, fields = (self._kind, self._fields) if of_rows else (torch.optim.AdamW, {"weight_decay": 0.0})
            self._steppers[copied] = kind([copied], lr=1.0, **fields)  # a rate of zero is refused
        copied.grad = self._form(gradient) if of_rows else gradient
        for group in self._steppers[copied].param_groups:
            group["lr"] = rate
        self._steppers[copied].step()
        copied.grad = None
        self._of[copied].copy_(copied)
