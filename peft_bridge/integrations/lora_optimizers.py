"""PEFT's optimizers for LoRA, which know parameters by LoRA's names: where they do not fit a method they are refused.

They take any model, and would leave a method out without a word (LoRA+), or fail within a step (LoRA-FA). What is
replaced is looked up by PEFT's functions when they run, so it does not matter who has imported them before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import peft.optimizers.lorafa as lorafa
import peft.optimizers.loraplus as loraplus

_refused: dict[tuple[str, str], str] = {}


def refuse_lora_optimizer(name: str, prefix: str, remedy: str) -> None:
    """Raise an error where one of PEFT's optimizers is made for a model with a method's parameters.

    Args:
        name: "LoRA+" or "LoRA-FA".
        prefix: of the method's parameters, e.g. "meft_".
        remedy: the error's sentence after "... cannot be used: ".
    """
    _refused[name, f".{prefix}"] = remedy
    if not hasattr(loraplus.get_parameter_names, "_aslora_meft"):
        loraplus.get_parameter_names = _names(loraplus.get_parameter_names)
        lorafa.LoraFAOptimizer.__init__ = _initialise(lorafa.LoraFAOptimizer.__init__)  # type: ignore[method-assign]


def _check(optimizer: str, names: list[str]) -> None:
    for (refused, prefix), remedy in _refused.items():
        if refused == optimizer and any(prefix in name for name in names):
            raise ValueError(f"{optimizer} cannot be used with parameters '{prefix.strip('.')}...': {remedy}")


def _names(get_parameter_names: Callable[..., list[str]]) -> Callable[..., list[str]]:
    @functools.wraps(get_parameter_names)
    def checked(model: Any, *args: Any, **kwargs: Any) -> list[str]:
        _check("LoRA+", [name for name, parameter in model.named_parameters() if parameter.requires_grad])
        return get_parameter_names(model, *args, **kwargs)

    checked._aslora_meft = True  # type: ignore[attr-defined]
    return checked


def _initialise(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def checked(self: Any, params: Any, *args: Any, **kwargs: Any) -> None:
        params = list(params)
        _check("LoRA-FA", [name for group in params if isinstance(group, dict) for name in group.get("names", [])])
        init(self, params, *args, **kwargs)

    return checked
