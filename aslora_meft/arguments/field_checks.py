"""Checks of fields of LoRA that PEFT takes as they are, and fails or runs for ever where a layer is made of them."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from aslora_meft.errors import UsageError

_MOST_NITER = 1000  # PEFT's examples have 4 and 16
_MOST_LOFTQ_ITER = 100


def check_field(name: str, value: Any) -> None:
    """Check a field's value by itself.

    Raises:
        UsageError: one that no layer can be made of.
    """
    if name in _CHECKS and value is not None:
        _CHECKS[name](name, value)


def check_initialisation(init: Any) -> None:
    """Raises: UsageError: an `init_lora_weights` that PEFT cannot compute in a run here."""
    if init == "loftq" and not (torch.cuda.is_available() or torch.xpu.is_available()):
        raise UsageError(
            "init_lora_weights='loftq' needs a CUDA device and this machine has none; give another initialisation, "
            "such as pissa"
        )
    if init == "corda":
        raise UsageError(
            "init_lora_weights='corda' needs what peft's preprocess_corda computes, from Python; give another "
            "initialisation, such as pissa"
        )


def _check_pattern(name: str, pattern: Any) -> None:
    if not isinstance(pattern, Mapping):
        raise UsageError(f"{name}={str(pattern)[:40]} is no JSON object; give one of names and numbers")
    for key, value in pattern.items():
        rank = name == "rank_pattern"
        right = type(value) is int and 1 <= value < 2**31 if rank else type(value) in (int, float) and abs(value) < 1e30
        if not right:
            what = "no rank; give an integer of at least 1" if rank else "no finite number; give one"
            raise UsageError(f"{name}: {str(value)[:40]!r} of {key!r} is {what}")


def _check_init(name: str, value: Any) -> None:
    prefix = "pissa_niter_"
    if isinstance(value, str) and value.startswith(prefix):
        number = value.removeprefix(prefix)
        if not re.fullmatch("[0-9]{1,9}", number) or int(number) > _MOST_NITER:
            raise UsageError(
                f"{name}={value[:60]!r} is no PiSSA; give {prefix} with an integer from 0 to {_MOST_NITER}"
            )


def _check_loftq_config(name: str, value: Any) -> None:
    given = value if isinstance(value, Mapping) else vars(value)
    if not given:  # PEFT's default
        return
    bits, steps = given.get("loftq_bits"), given.get("loftq_iter")
    right = given.keys() == {"loftq_bits", "loftq_iter"} and bits in (4, 8)
    if not (right and type(steps) is int and 1 <= steps <= _MOST_LOFTQ_ITER):
        raise UsageError(
            f"{name}={str(given)[:60]} is refused; give loftq_bits 4 or 8 and loftq_iter from 1 to {_MOST_LOFTQ_ITER}"
        )


def _check_group_size(name: str, value: Any) -> None:
    if value < 1:
        raise UsageError(f"{name}={value} is no size; give an integer of at least 1")


def _refuse_arrow(name: str, value: Any) -> None:
    raise UsageError(
        f"{name} combines adapters that are trained already; drop it, and use peft's create_arrow_model with them"
    )


_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "rank_pattern": _check_pattern,
    "alpha_pattern": _check_pattern,
    "init_lora_weights": _check_init,
    "loftq_config": _check_loftq_config,
    "qalora_group_size": _check_group_size,
    "arrow_config": _refuse_arrow,
}
