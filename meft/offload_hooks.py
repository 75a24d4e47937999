"""accelerate's hooks: they bring a module's parameters when it is called, and nobody calls those that hold an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

# The attribute under which accelerate (and what uses it: `device_map`, `cpu_offload`, `disk_offload`) keeps its hook.
HOOK = "_hf_hook"


@contextmanager
def parameters_here(module: nn.Module) -> Iterator[None]:
    """Let a module have its parameters inside of the block, as if it was called there."""
    hook = getattr(module, HOOK, None)
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)
