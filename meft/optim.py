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

from .moments import Moments
from .row_gradient import as_row_gradient
from .row_steps import TWO_OPTIMIZERS, update_table
from .row_update import StepRule
from .store import RowTable


class RowAdamW(Optimizer):
    """AdamW that updates only the rows that the gradients of MEFT tables name.

    For those who build their own optimizer; with torch's or bitsandbytes' Adam and AdamW nothing has to be done. Other
    parameters may be in it too and get AdamW, bfloat16 ones with stochastic rounding. The moments of a table belong to
    the table (`RowTable.moments`) and are in the optimizer's state dict as well.

    What `MEFTConfig.row_optimizer` says is for the automatic way and not read here.

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
        tables = RowTable.by_parameter()
        for group in self.param_groups:
            beta1, beta2 = map(float, group["betas"])
            rule = StepRule(
                float(group["lr"]), beta1, beta2, float(group["eps"]), float(group["weight_decay"]), decoupled=True
            )
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                table = tables.get(id(parameter))
                if table is not None:
                    gradient = as_row_gradient(parameter.grad)
                    if table.updates is not None:  # its thread reads it after the step: nobody else may zero it
                        parameter.grad = None
                    table.follow(self)
                    update_table(table, gradient, rule)
                else:
                    self._step_whole(parameter, rule)
        return loss

    def _step_whole(self, parameter: nn.Parameter, rule: StepRule) -> None:
        """AdamW for a parameter that is no table: one whose rows are all touched."""
        if not parameter.numel():
            return
        flat = parameter.detach().reshape(len(parameter) if parameter.ndim else 1, -1).contiguous()
        state = self.state[parameter]
        if not state:
            state["moments"] = Moments.fresh(flat)
        gradient = parameter.grad.reshape(flat.shape)  # type: ignore[union-attr]
        state["moments"].update(flat, None, torch.arange(len(flat), device=flat.device), gradient, rule, 0)
        if flat.data_ptr() != parameter.data_ptr():  # of a parameter that is not contiguous: a copy
            parameter.copy_(flat.view(parameter.shape))

    def state_dict(self) -> dict[str, Any]:
        """As torch's; the tensors of a table's moments are the table's own, not copies."""
        saved = super().state_dict()
        tables = RowTable.by_parameter()
        states: dict[int, Any] = {}
        for i, parameter in enumerate(p for g in self.param_groups for p in g["params"]):
            table = tables.get(id(parameter))
            moments = table.moments if table is not None else self.state.get(parameter, {}).get("moments")
            if moments is not None:
                states[i] = moments.tensors()
        return {**saved, "state": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore hyper-parameters and moments; the moments are copied.

        Raises:
            ValueError: the groups, or a shape, do not fit.
        """
        parameters = [p for g in self.param_groups for p in g["params"]]
        restored = {}
        for i, tensors in state_dict["state"].items():
            moments = Moments.from_tensors({k: v.clone() for k, v in tensors.items()})
            rows = len(parameters[i]) if i < len(parameters) and parameters[i].ndim else 1
            if i >= len(parameters) or len(moments.counts) != rows:
                raise ValueError(
                    f"The state of parameter {i} does not fit this optimizer: make it over the same model."
                )
            restored[i] = moments
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        tables = RowTable.by_parameter()
        for i, moments in restored.items():
            parameter = parameters[i]
            moments.move(parameter.device)
            table = tables.get(id(parameter))
            if table is None:
                self.state[parameter]["moments"] = moments
            else:
                table.moments, table.owner = moments, weakref.ref(self)
