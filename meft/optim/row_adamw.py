"""Row-wise AdamW: by itself under a stock Adam or AdamW, or as `RowAdamW`.

On a row's n-th touch its moments decay once, bias correction uses that row's own n, decoupled decay is applied once;
rows that are not touched do not change at all. (AdamW: arXiv 1711.05101; rows on the host: arXiv 2406.04984, section
3.3, which leaves the rule open.)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..gradient.row_gradient import as_row_gradient
from ..table.moments import KEY, RowMoments, count_step, moments_of, moments_of_0_1
from ..table.row_step import StepRule, update_rows
from ..table.row_table import RowTable
from .optimizer_hook import TWO_OPTIMIZERS
from .table_steps import TableStep, update_tables


class RowAdamW(Optimizer):
    """AdamW that updates only the rows that the gradients of MEFT tables name.

    For those who build their own optimizer; with torch's or bitsandbytes' Adam and AdamW nothing has to be done. Other
    parameters may be in it too and get AdamW, bfloat16 ones with stochastic rounding.

    What `MEFTConfig.row_optimizer` says is for the automatic way and not read here, but for `moments` and `zero_copy`.

    Args:
        params: parameters or groups; a table may be in one optimizer only.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW` (decoupled weight decay), but weight_decay is 0.

    Raises:
        ValueError: a hyper-parameter is out of range, or a table is in another RowAdamW.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if float(value) < 0:
                raise ValueError(f"{name}={value} must be at least 0.")
        if not all(0 <= float(b) < 1 for b in betas):
            raise ValueError(f"betas={betas} must be in [0, 1).")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and claim its tables."""
        super().add_param_group(param_group)
        tables = RowTable.by_parameter()
        for parameter in self.param_groups[-1]["params"]:
            table = tables.get(id(parameter))
            if table is None:
                continue
            other = table.claimed_by() if table.claimed_by is not None else None
            if other is not None and other is not self:
                self.param_groups.pop()
                raise ValueError(TWO_OPTIMIZERS)
            table.claimed_by = weakref.ref(self)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; a parameter without a gradient is left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        tables, steps = RowTable.by_parameter(), []
        for group in self.param_groups:
            beta1, beta2 = map(float, group["betas"])
            rule = StepRule(
                float(group["lr"]), beta1, beta2, float(group["eps"]), float(group["weight_decay"]), decoupled=True
            )
            for parameter in group["params"]:
                given = parameter.grad
                if given is None:
                    continue
                table = tables.get(id(parameter))
                if table is not None:
                    gradient = as_row_gradient(given, parameter)
                    if gradient is not given:
                        parameter.grad = gradient
                    entry = table.moments_in(self)
                    count_step(self, parameter)
                    steps.append(TableStep(table, entry, gradient, rule))
                else:
                    self._step_whole(parameter, rule)
        update_tables(steps)
        return loss

    def _step_whole(self, parameter: nn.Parameter, rule: StepRule) -> None:
        """AdamW for a parameter that is no table: one whose rows are all touched."""
        if not parameter.numel():
            return
        flat = parameter.detach().reshape(len(parameter) if parameter.ndim else 1, -1).contiguous()
        moments = moments_of(self, parameter, rows=flat).exclusive(flat.device)
        count_step(self, parameter)
        gradient = parameter.grad.reshape(flat.shape)  # type: ignore[union-attr]
        update_rows(moments.row_state(flat), torch.arange(len(flat), device=flat.device), gradient, rule)
        if flat.data_ptr() != parameter.data_ptr():  # of a parameter that is not contiguous: a copy
            parameter.copy_(flat.view(parameter.shape))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; also a state that 0.1 saved.

        Raises:
            ValueError: the groups do not fit, or 0.1 saved it in a mode that is gone.
        """
        states = {i: _entry_of_0_1(held) if "clock" in held else held for i, held in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": states})


def _entry_of_0_1(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {"step": torch.zeros((), device="cpu"), KEY: RowMoments(moments_of_0_1(tensors).clone())}
