"""What moves between the host and the device, and the count of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Traffic:
    """Counters of one layer since it was made.

    Where the model runs on the CPU, nothing has to move; then the counters say what would.

    Attributes:
        forwards: forward passes that retrieved rows, recomputations included.
        tokens: tokens of these passes, without padding.
        union_rows: sum over the passes of |U|, the distinct neurons that were used.
        bytes_to_device: rows, and the picks' ids and scores, brought to the device.
        bytes_to_host: hidden states, router logits and row gradients brought to the host.
        expert_load: int64 [E] on the host, picks of neurons of each expert.
    """

    forwards: int = 0
    tokens: int = 0
    union_rows: int = 0
    bytes_to_device: int = 0
    bytes_to_host: int = 0
    expert_load: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))


def nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def bring_rows(table: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """The named rows of a table, [u, d], with the device and dtype of `like`.

    They are gathered where the table lies, cross in the table's dtype, and become wider on the other side.
    """
    return table.index_select(0, rows).to(like.device).to(like.dtype)


def page_lock(tensor: Tensor) -> bool:
    """Page-lock the memory of a CPU tensor, so that a CUDA device reads it at full speed.

    Registering takes exactly the tensor's bytes, where `pin_memory` would round up to a power of two.

    Returns:
        Whether it is locked now: False without CUDA, or where the driver refuses (too little lockable memory).
    """
    if not torch.cuda.is_available() or not tensor.numel():
        return False
    return int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), nbytes(tensor), 0)) == 0


def page_unlock(address: int) -> None:
    """Undo `page_lock` of the memory at an address."""
    torch.cuda.cudart().cudaHostUnregister(address)
