"""Triton and its language, or stand-ins with which the modules import where Triton has no build (macOS, Windows)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:

    class _Absent:
        """Just enough for a module with kernels to be imported; `dispatch` then never chooses Triton."""

        __version__ = ""
        constexpr = object

        @staticmethod
        def jit(function: Any) -> Any:
            return function

    triton = tl = _Absent()  # type: ignore[assignment]

AVAILABLE: bool = bool(triton.__version__)
# Fixed when a kernel is decorated, as in Triton itself: interpreted and compiled kernels do not mix in one process.
INTERPRETED: bool = AVAILABLE and bool(triton.knobs.runtime.interpret)


def kernel(*aligned: str) -> Callable[[Any], Any]:
    """triton.jit for a kernel that is compiled anew for integers `aligned` that are multiples of 16, and for no others.

    Loads of 16 bytes need to know it of rows' lengths and distances. Triton would look at every integer, and at 1 too,
    which it makes a constant (the aligned ones it still does); unless told not to, it would compile another kernel in
    the middle of a run for a batch of one token, and what the ahead-of-time check has seen would not be what runs.
    """

    def decorate(function: Any) -> Any:
        if not AVAILABLE:
            return function
        parameters = inspect.signature(function).parameters.values()
        values = {p.name for p in parameters if not (p.name.endswith("_ptr") or "constexpr" in str(p.annotation))}
        return triton.jit(function, do_not_specialize=sorted(values - set(aligned)))

    return decorate
