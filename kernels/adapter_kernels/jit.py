"""Triton and its language, or stand-ins with which the modules import where Triton has no build (macOS, Windows)."""

from __future__ import annotations

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
