"""Names of accelerate that its documentation leaves out; `tests/peft_bridge/test_accelerate_private.py` tests them."""

from __future__ import annotations

from torch import nn


def forget_prepared(model: nn.Module) -> None:
    """Let `Accelerator.prepare` take a model, not wrapped by DDP, as one that it has not prepared yet."""
    vars(model).pop("_is_accelerate_prepared", None)
