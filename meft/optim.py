"""Row-wise AdamW: by itself under a stock Adam or AdamW, or as `RowAdamW`.

Two modes. `lazy`: on a row's n-th touch its moments decay once, bias correction uses that row's own n, decoupled decay
is applied once; rows that are not touched do not change at all. `dense`: every row equals that of torch's AdamW over
the whole matrix before it is read; the steps that it has missed are replayed one by one. (AdamW: arXiv 1711.05101;
rows on the host: arXiv 2406.04984, section 3.3, which leaves both open.)
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from .config import MEFTConfig
from .moments import Moments
from .row_gradient import RowGradient, as_row_gradient, overflow_watchers
from .row_update import StepRule
from .store import RowTable

_BNB_ADAM = {"Adam", "AdamW", "Adam8bit", "AdamW8bit", "Adam32bit", "AdamW32bit"}


def _is_bitsandbytes_adam(optimizer: Optimizer) -> bool:
    kind = type(optimizer)
    return kind.__module__.startswith("bitsandbytes.") and kind.__name__.removeprefix("Paged") in _BNB_ADAM


def rule_of(optimizer: Optimizer, group: dict[str, Any], given: dict[str, Any] | None) -> StepRule:
    """The row rule of one step.

    Args:
        optimizer: who steps.
        group: its parameter group with the rows.
        given: `MEFTConfig.row_optimizer`.

    Raises:
        ValueError: the optimizer is no Adam or AdamW whose rule is known, and `given` has no lr.
    """
    given = given or {}
    # By exact type: a subclass may step by another rule.
    torch_adam, bnb_adam = type(optimizer) in (Adam, AdamW), _is_bitsandbytes_adam(optimizer)
    if not (torch_adam or bnb_adam) and "lr" not in given:
        raise ValueError(
            f"MEFT's rows are updated by the rule of Adam or AdamW, and {type(optimizer).__name__} is neither: use "
            "one of these, give the rows to meft.RowAdamW, or set row_optimizer=dict(lr=..., betas=...) in MEFTConfig."
        )
    for name in ("amsgrad", "maximize"):
        if (torch_adam or bnb_adam) and group.get(name):
            raise ValueError(
                f"{type(optimizer).__name__} has {name}=True, which MEFT's rows do not support: set it to False."
            )
    known = group if torch_adam or bnb_adam else {}
    beta1, beta2 = given.get("betas", known.get("betas", (0.9, 0.999)))
    return StepRule(
        lr=float(given.get("lr", known.get("lr", 0.0))),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(given.get("eps", known.get("eps", 1e-8))),
        weight_decay=float(given.get("weight_decay", known.get("weight_decay", 0.0))),
        # Decoupled: AdamW, and all of bitsandbytes' Adams; coupled is torch's Adam alone.
        decoupled=not torch_adam or bool(group.get("decoupled_weight_decay", type(optimizer) is AdamW)),
    )


def group_of(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """The parameter group that holds a parameter."""
    return next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))


def prepare_table(table: RowTable, mode: str) -> None:
    """Make a table's moments, where there are none of the mode: all that an update allocates for good."""
    table.settle()  # not under the lock, which the update needs
    with table.lock, torch.no_grad():
        moments = table.moments
        if moments is not None and moments.dense == (mode == "dense"):
            return
        table.catch_up()
        if moments is not None:
            warnings.warn(
                f"The moments of MEFT's rows were made in the other mode than mode='{mode}' and restart: go on in "
                "the mode of the checkpoint to keep them."
            )
        table.moments = Moments.fresh(table.rows.detach(), dense=mode == "dense", seed=table.seed)


def update_table(table: RowTable, gradient: RowGradient, rule: StepRule, *, mode: str, divisor: float = 1.0) -> None:
    """One step of a table, now or by the thread of `table.updates`.

    Args:
        divisor: a loss scale that is still in the gradient.
    """
    prepare_table(table, mode)
    rows, values = gradient.rows, gradient.row_values

    def update() -> None:
        moments = table.moments
        assert moments is not None
        wide = values.to(torch.promote_types(table.rows.dtype, torch.float32)).contiguous()
        wide = wide / divisor if divisor != 1.0 else wide
        master = table.rows.detach()
        # In dense mode any row may move: a long history is replayed into all.
        touched = None if moments.dense else rows
        table.writing(lambda wire: moments.update(master, wire, rows, wide, rule), rows=touched)

    if table.updates is None:
        with torch.no_grad():
            update()
    else:
        table.update_later(update)


class RowSteps:
    """A `peft_bridge.StepListener`: updates the touched rows at the steps of the optimizer that holds them.

    Attributes:
        tables: adapter -> its tables.
        configs: adapter -> its configuration.
        routers: adapter -> of each layer, the adapters' routers.
        nonfinite_steps: steps that changed nothing because a gradient was inf or nan, those that a GradScaler
            skipped included.
    """

    def __init__(self) -> None:
        self.tables: dict[str, list[RowTable]] = {}
        self.configs: dict[str, MEFTConfig] = {}
        self.routers: dict[str, list[nn.ParameterDict]] = {}
        self.nonfinite_steps = 0
        self._taken: list[tuple[RowTable, RowGradient, StepRule, str, float]] = []
        self._overflow: weakref.ref[Tensor] | None = None
        overflow_watchers.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_taken": [], "_overflow": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        overflow_watchers.add(self)

    def note_overflow(self, owners: set[int], found_inf: Tensor) -> None:
        """A GradScaler has found inf or nan and will skip the step; it may look at several lists of gradients."""
        mine = any(id(table.rows) in owners for tables in self.tables.values() for table in tables)
        if mine and (self._overflow is None or self._overflow() is not found_inf):
            self._overflow = weakref.ref(found_inf)
            self.nonfinite_steps += 1

    def _of(self, parameters: Iterable[nn.Parameter]) -> list[tuple[str, RowTable]]:
        wanted = {id(p) for p in parameters}
        return [(name, t) for name, tables in self.tables.items() for t in tables if id(t.rows) in wanted]

    def watched_parameters(self) -> Iterable[nn.Parameter]:
        """All tables, and the routers, so that a step is taken or skipped as a whole."""
        tables = [table.rows for tables in self.tables.values() for table in tables]
        return [*tables, *(owner[name] for name, owners in self.routers.items() for owner in owners)]

    def before_step(self, optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
        """Refuse an optimizer whose rule is unknown, before anything moves."""
        self._taken = []
        if isinstance(optimizer, RowAdamW):
            return
        for name, table in self._of(parameters):
            if table.claimed_by is not None and table.claimed_by() is not None:
                raise ValueError(_TWO_OPTIMIZERS)
            rule_of(optimizer, group_of(optimizer, table.rows), self.configs[name].row_optimizer)

    def gradients_ready(self, optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
        """Take the row gradients away, so that the optimizer leaves the tables alone and makes no state for them."""
        if isinstance(optimizer, RowAdamW):
            return
        scaler = getattr(optimizer, "grad_scale", None)  # of a fused step under a GradScaler: not yet unscaled
        divisor = float(scaler) if scaler is not None else 1.0
        for name, table in self._of(parameters):
            gradient, table.rows.grad = table.rows.grad, None
            if gradient is None:
                continue
            config = self.configs[name]
            rule = rule_of(optimizer, group_of(optimizer, table.rows), config.row_optimizer)
            # Of an optimizer that calls its closure several times in a step, the last gradient.
            self._taken = [taken for taken in self._taken if taken[0] is not table]
            self._taken.append((table, as_row_gradient(gradient), rule, config.row_mode, divisor))
            prepare_table(table, config.row_mode)

    def after_step(self, optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
        """Update the rows, those of the first layer first: the next forward pass reads them first."""
        taken, self._taken = self._taken, []
        for table, gradient, rule, mode, divisor in taken:
            table.follow(optimizer)
            update_table(table, gradient, rule, mode=mode, divisor=divisor)


_TWO_OPTIMIZERS = (
    "A table of MEFT rows is in two optimizers, a meft.RowAdamW and another one: leave it out of one of them."
)


class RowAdamW(Optimizer):
    """AdamW that updates only the rows that the gradients of MEFT tables name.

    For those who build their own optimizer; with torch's or bitsandbytes' Adam and AdamW nothing has to be done. Other
    parameters may be in it too and get AdamW, bfloat16 ones with stochastic rounding. The moments of a table belong to
    the table (`RowTable.moments`) and are in the optimizer's state dict as well.

    What `MEFTConfig.row_optimizer` says is for the automatic way and not read here.

    Args:
        params: parameters or groups; a table may be in one optimizer only.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW` (decoupled weight decay), but weight_decay is 0.
        mode: "lazy" or "dense", see `meft.optim`.

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
        *,
        mode: str = "lazy",
    ) -> None:
        if mode not in ("lazy", "dense"):
            raise ValueError(f"mode={mode!r} is unknown: use 'lazy' or 'dense'.")
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if float(value) < 0:
                raise ValueError(f"{name}={value} must be at least 0.")
        if not all(0 <= float(b) < 1 for b in betas):
            raise ValueError(f"betas={betas} must be in [0, 1).")
        self.mode = mode
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
                raise ValueError(_TWO_OPTIMIZERS)
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
                    table.follow(self)
                    update_table(table, as_row_gradient(parameter.grad), rule, mode=self.mode)
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
            state["moments"] = Moments.fresh(flat, dense=False, seed=0)
        gradient = parameter.grad.reshape(flat.shape)  # type: ignore[union-attr]
        state["moments"].update(flat, None, torch.arange(len(flat), device=flat.device), gradient, rule)
        if flat.data_ptr() != parameter.data_ptr():  # of a parameter that is not contiguous: a copy
            parameter.copy_(flat.view(parameter.shape))

    def state_dict(self) -> dict[str, Any]:
        """As torch's; the tensors of a table's moments are the table's own, not copies."""
        saved = super().state_dict()
        tables = RowTable.by_parameter()
        states: dict[int, Any] = {}
        for i, parameter in enumerate(p for g in self.param_groups for p in g["params"]):
            table = tables.get(id(parameter))
            if table is not None:
                table.catch_up()  # as the model's state dict does: the two fit together whichever is taken first
            moments = table.moments if table is not None else self.state.get(parameter, {}).get("moments")
            if moments is not None:
                states[i] = moments.tensors()
        return {**saved, "state": states, "mode": self.mode}

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
        self.mode = state_dict.get("mode", self.mode)
        tables = RowTable.by_parameter()
        for i, moments in restored.items():
            parameter = parameters[i]
            moments.move(parameter.device)
            table = tables.get(id(parameter))
            if table is None:
                self.state[parameter]["moments"] = moments
            else:
                table.moments, table.owner = moments, weakref.ref(self)
