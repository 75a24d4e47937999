"""Counts the bytes of live tensors, part by part, while a training step runs: on the meta device, where nothing is
allocated, or on a real one."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from peft_bridge.torch_private import TorchDispatchMode, all_overloads, storage_address, tree_map_only

PARTS = (
    "base", "router", "adapter", "optimizer", "gradients", "saved rows", "key buffers", "buffers", "hot rows",
    "activations",
)  # fmt: skip


class MemoryTracker(TorchDispatchMode):
    """Sees each tensor that an operation returns, and counts its storage until it is freed.

    Attributes:
        parts: part -> bytes that are live now; what nobody has named is 'activations'.
        peak: the most bytes that were live at once.
        at_peak: `parts` at that moment.
        flops: of the matrix products (torch's own formulas), and those of `note_flops`.
    """

    current: ClassVar[MemoryTracker | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.parts = dict.fromkeys(PARTS, 0)
        self.at_peak = dict(self.parts)
        self.peak = self.total = 0
        self.flops = 0
        self._live: dict[int, tuple[str, int]] = {}  # storage -> its part and bytes

    def see(self, tensor: Tensor, part: str = "activations", nbytes: int | None = None) -> None:
        """Count a tensor's storage unless it is counted already; nbytes: in place of its own size."""
        if tensor.layout is not torch.strided:
            return  # made of tensors that were counted
        storage = tensor.untyped_storage()
        key = storage_address(tensor)
        if key in self._live:
            return
        size = storage.nbytes() if nbytes is None else nbytes
        self._live[key] = (part, size)
        weakref.finalize(storage, self._freed, key)
        self.parts[part] += size
        self.total += size
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.parts)

    def label(self, tensor: Tensor, part: str) -> None:
        """Say which part a counted tensor belongs to."""
        key = storage_address(tensor)
        former, size = self._live[key]
        self._live[key] = (part, size)
        self.parts[former] -= size
        self.parts[part] += size

    def allocate(self, nbytes: int, part: str) -> Tensor:
        """A meta tensor of so many bytes, counted until it is freed."""
        tensor = torch.empty(nbytes, dtype=torch.uint8, device="meta")
        self.see(tensor, part)
        self.label(tensor, part)  # seen by the dispatch mode before
        return tensor

    def note_flops(self, flops: float) -> None:
        """Count what an operation without a formula computes."""
        self.flops += int(flops)

    def _freed(self, key: int) -> None:
        part, size = self._live.pop(key)
        self.parts[part] -= size
        self.total -= size

    def __enter__(self) -> MemoryTracker:
        MemoryTracker.current = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        MemoryTracker.current = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind not in (Tensor, nn.Parameter) for kind in types):
            return NotImplemented  # a tensor made of others (`RowGradient`): what it does with them comes here again
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tree_map_only(Tensor, self.see, out)
        formula = flop_registry.get(all_overloads(func))
        if formula is not None:
            self.flops += int(formula(*args, **kwargs, out_val=out))
        return out
