"""Bytes of what an optimizer keeps for each trainable tensor."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# The Trainer's name -> what it keeps.
OPTIMIZERS = {
    "adamw_torch_fused": "adamw",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_32bit": "paged_adamw",
}
_BLOCK = 256  # values that share a scale in bitsandbytes' 8-bit optimizers
_LEAST_8BIT, _LEAST_PAGED = 4096, 100_000  # smaller tensors keep plain states


class StateBytes(NamedTuple):
    """Bytes on the device, and in memory that is paged between host and device."""

    device: int
    paged: int


def state_bytes(parameter: Tensor, optimizer: str) -> StateBytes:
    """Both moments of one tensor: torch's AdamW in the tensor's dtype, bitsandbytes' in 8 bits, or paged in fp32."""
    n, optimizer = parameter.numel(), OPTIMIZERS[optimizer]
    if optimizer == "adamw":
        return StateBytes(2 * n * parameter.element_size() + 4, 0)  # and the step
    if optimizer == "adamw_8bit" and n >= _LEAST_8BIT:
        return StateBytes(2 * (n + 4 * -(-n // _BLOCK)), 0)
    if optimizer == "paged_adamw" and n >= _LEAST_PAGED:
        return StateBytes(0, 8 * n)
    return StateBytes(8 * n, 0)
