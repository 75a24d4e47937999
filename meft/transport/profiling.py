"""Names for a profiler's timeline, which cost nothing while none runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch.profiler import record_function

from peft_bridge.torch_private import is_profiling

_NOTHING: AbstractContextManager[object] = nullcontext()


def phase(name: str) -> AbstractContextManager[object]:
    """What happens inside of the block is called `meft: name` in a profile."""
    return record_function(f"meft: {name}") if is_profiling() else _NOTHING
