"""bitsandbytes' 4-bit layers on a CPU, which an evaluation would make unfit for training."""

from __future__ import annotations

from typing import Any

from torch import nn


def keep_trainable_on_cpu(model: nn.Module) -> None:
    """Keep 4-bit weights in the layout that has a backward pass.

    On CPUs with bfloat16 instructions bitsandbytes repacks them at the first forward pass without gradients, for good:
    training that comes after an evaluation would get no gradient through them.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
