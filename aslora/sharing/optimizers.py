"""What ASLoRA asks of an optimizer: its learning rate, and that each value moves on its own."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

_LAYER_WISE = re.compile("lamb|lars", re.IGNORECASE)


def _holds(optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    return any(p is parameter for group in optimizer.param_groups for p in group["params"])


def _group_of(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    return next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))


def learning_rate(optimizer: Optimizer, parameter: nn.Parameter) -> float:
    """The learning rate of a parameter's group; 1.0 where it has none."""
    return float(_group_of(optimizer, parameter).get("lr", 1.0) or 0.0)


def refuse_norms(optimizer: Optimizer, stacked_b: nn.Parameter) -> None:
    """Refuse an optimizer whose step depends on the norm of a parameter: rows that layers share would count repeatedly.

    Raises:
        ValueError: it is an Adafactor that scales by the parameter, a LAMB or a LARS, or a wrapper around one.
    """
    for inner in vars(optimizer).values():
        if isinstance(inner, Optimizer) and _holds(inner, stacked_b):
            refuse_norms(inner, stacked_b)
    kind = type(getattr(optimizer, "stepped_by", optimizer))
    names = [cls.__name__ for cls in kind.__mro__]
    remedy = "use an optimizer without, such as AdamW"
    if any("adafactor" in name.lower() for name in names):
        of_torch = issubclass(kind, torch.optim.Adafactor)
        if not _group_of(optimizer, stacked_b).get("scale_parameter", of_torch):
            return
        if not of_torch:
            remedy = "pass scale_parameter=False"
    elif not any(_LAYER_WISE.search(name) for name in names):
        return
    raise ValueError(
        f"The optimizer {kind.__module__}.{kind.__name__} scales its steps by norms of parameters, in which rows of "
        f"B that layers share count once for each layer: {remedy}, or set num_merges=0."
    )


def moves_between_steps(optimizer: Optimizer) -> bool:
    """Whether an optimizer may move parameters between its steps by values that it keeps, as schedule-free ones do.

    Those of torch, transformers, bitsandbytes, torchao and DeepSpeed do not.
    """
    known = ("torch.optim.", "transformers.", "bitsandbytes.", "torchao.", "deepspeed.")
    return not type(getattr(optimizer, "stepped_by", optimizer)).__module__.startswith(known)
