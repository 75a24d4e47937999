"""What `MEFTConfig.row_optimizer` may hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from peft_bridge import is_number

if TYPE_CHECKING:
    from .config import MEFTConfig

_KEYS = ("in_backward", "zero_copy", "lr", "betas", "eps", "weight_decay")


def check_row_optimizer(config: MEFTConfig) -> None:
    """Raises: ValueError: a key is unknown, or a value impossible, alone or beside the other fields."""
    given = config.row_optimizer
    if given is None:
        return
    if not isinstance(given, Mapping) or set(given) - set(_KEYS):
        raise ValueError(f"row_optimizer={given!r} must be None or a dict with some of {', '.join(_KEYS)}.")
    for name in ("in_backward", "zero_copy"):
        if not isinstance(given.get(name, False), bool):
            raise ValueError(f"row_optimizer: {name}={given[name]!r} must be True or False.")
    if given.get("zero_copy", False):
        _check_zero_copy(config)
    for name in ("lr", "eps", "weight_decay"):
        if name in given and (not is_number(given[name]) or given[name] < 0):
            raise ValueError(f"row_optimizer: {name}={given[name]!r} must be a number of at least 0.")
    if "betas" in given:
        betas = given["betas"]
        good = isinstance(betas, list | tuple) and len(betas) == 2
        if not good or not all(is_number(b) and 0 <= b < 1 for b in betas):
            raise ValueError(f"row_optimizer: betas={betas!r} must be two numbers in [0, 1), e.g. (0.9, 0.999).")


def _check_zero_copy(config: MEFTConfig) -> None:
    needs = "row_optimizer: zero_copy=True needs"
    if config.master_dtype == "float64":
        raise ValueError(f"{needs} master_dtype='float32' or 'bfloat16': the GPU's kernel has no float64.")
    if not (config.on_host and config.pin_memory):
        raise ValueError(
            f"{needs} rows in page-locked host memory: leave placement='host' and pin_memory=True, or leave it out."
        )
