"""Names of torch that its documentation leaves out; `tests/adapter_kernels/test_torch_private.py` says what they do."""

from __future__ import annotations

import torch
from torch import Tensor

_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.maybe_current_level  # type: ignore[attr-defined]


def nobody_between(tensor: Tensor) -> bool:
    """Whether an operation on a tensor goes to its kernel alone: no subclass, mode, transform or trace takes part."""
    if torch.compiler.is_compiling():  # first: a trace knows no more of what follows
        return False
    return type(tensor) is Tensor and not _modes() and _transforms() is None
