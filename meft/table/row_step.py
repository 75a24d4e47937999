"""AdamW and Adam on the touched rows of tables.

float32 and bfloat16 tables on the CPU are stepped by a small C++ library, if there was a compiler at installation. All
others, and machines without it, use `adapter_kernels.row_adamw`: its kernel for a table on a GPU, torch operations
otherwise. All give the same bits: the same operations in the same order, each rounded. The library has threads of its
own, as many as `adapter_kernels.runtime.host_threads` returns.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import Tensor

from adapter_kernels import RowState, StepRule, row_adamw
from adapter_kernels.adamw.moment_layout import MODES
from adapter_kernels.adamw.stochastic_rounding import row_keys
from adapter_kernels.runtime.host_threads import host_threads
from adapter_kernels.topk import host_topk

__all__ = ["RowState", "StepRule", "multiplied", "native_library", "update_rows"]

_VERSION = 9  # of the library's arguments
_OF_THE_RULE = 7  # scalars of `Step` that all rows have in common
_BLOCK = 1 << 20  # values that torch multiplies at a time


def update_rows(
    state: RowState,
    rows: Tensor,
    grads: Tensor,
    rule: StepRule,
    *,
    seed: int = 0,
    factors: tuple[float, ...] = (),
    native: bool | None = None,
    ids: Tensor | None = None,
) -> None:
    """Take one step of the touched rows, in place; all other rows, moments and counts keep their bits.

    On a row's n-th touch its moments decay once and the bias correction uses that row's own n.

    Args:
        state: on any device. bfloat16 tables and narrow moments are computed in float32 and rounded stochastically
            by a generator of (seed, row, count, column): the same in any grouping of the rows.
        rows: [n] int64, ascending, each once, on the device of the state.
        grads: [n, d] in the table's dtype, float32 or bfloat16, on the device of the state.
        factors: at most two float32 numbers by which `grads`, in float32, are multiplied as they are read, in this
            order; `grads` themselves stay as they are.
        native: True takes the C++ library, False adapter_kernels, None (the default) the library where it applies.
        ids: int64 [n], ascending, the numbers of rows that are kept in another order: rounding goes by them, and `rows`
            may come in any order. None: `rows`.

    Raises:
        ValueError: arguments that do not fit together, or `native=True` where the library does not apply.
    """
    state.check()
    _check_rows(state.table, rows, grads, ids)
    library = _choose(native, state)
    if not rows.numel():
        return
    with torch.no_grad():
        if library is None:
            for block, multiplied_grads in _multiplied(grads, factors):
                part = None if ids is None else ids[block].contiguous()
                row_adamw(state, rows[block].contiguous(), multiplied_grads.contiguous(), rule, seed=seed, ids=part)
            return
        touches = state.counts.index_select(0, rows) + 1
        steps = _scalars(rule).expand(len(rows), -1).clone()
        for column, correction in enumerate(rule.corrections(touches), _OF_THE_RULE):
            steps[:, column] = correction
        rounds = state.mode != "float32" or state.table.dtype == torch.bfloat16
        _call(
            library,
            state,
            rows,
            grads,
            steps,
            row_keys(rows if ids is None else ids, touches, seed) if rounds else None,
            factors,
        )
        state.counts.index_copy_(0, rows, touches)


def _multiplied(grads: Tensor, factors: tuple[float, ...]) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their multiplied gradients, in blocks, so that there is never a second copy of all gradients."""
    copied = bool(factors) or grads.dtype == torch.bfloat16
    rows = max(1, _BLOCK // max(1, grads.shape[1])) if copied else len(grads)
    for start in range(0, len(grads), rows):
        block = slice(start, start + rows)
        yield block, multiplied(grads[block], factors)


def multiplied(values: Tensor, factors: tuple[float, ...], out: Tensor | None = None) -> Tensor:
    """Values times each of the factors, in their order; those in bfloat16 in float32.

    Args:
        out: takes them; None: new memory, where there are factors or values are widened.
    """
    if values.dtype == torch.bfloat16:
        values = out = values.to(torch.float32) if out is None else out.copy_(values)
    for factor in factors:
        values = out = torch.mul(values, factor, out=out)
    return values if out is None or values is out else out.copy_(values)


def _check_rows(table: Tensor, rows: Tensor, grads: Tensor, ids: Tensor | None = None) -> None:
    if rows.dim() != 1 or rows.dtype != torch.int64 or rows.device != table.device:
        raise ValueError(f"rows must be int64 [n] on {table.device}.")
    if grads.shape != (len(rows), table.shape[1]) or grads.device != table.device:
        raise ValueError(f"grads must be [{len(rows)}, {table.shape[1]}] on {table.device}, not {list(grads.shape)}.")
    if grads.dtype not in (table.dtype, torch.float32, torch.bfloat16):
        raise ValueError(f"grads must be {table.dtype}, float32 or bfloat16, not {grads.dtype}.")
    # Checking the values on a device would wait for it; there the kernel skips such a row, and torch has its own check.
    if ids is not None:
        if rows.is_cpu and len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < len(table)):
            raise ValueError(f"rows must be from 0 to {len(table) - 1}.")
    elif rows.is_cpu and not _ascend(rows, len(table)):
        raise ValueError(f"rows must ascend, each once, from 0 to {len(table) - 1}.")


# ---------------------------------------------------------------------------------------------------- the C++ library


@functools.cache
def native_library() -> ctypes.CDLL | None:
    """The library that was built at installation; None if there is none, or one of another version."""
    try:
        spec = find_spec("meft.table._row_adamw")
        library = ctypes.CDLL(spec.origin) if spec and spec.origin else None
        if library is None or library.meft_row_adamw_version() != _VERSION:
            return None
        declare(library)
        if (picking := host_topk.native_library()) is not None:
            library.meft_give_way_to(picking.host_topk_urgent())
    except (ImportError, OSError, AttributeError):
        return None
    return library


def declare(library: ctypes.CDLL) -> None:
    """Tell ctypes the arguments of the library's functions."""
    p, i, f, n = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    library.meft_row_adamw.argtypes = [n, n, n, p, p, p, p, p, p, p, p, p, i, i, p, f, f, n]
    library.meft_row_adamw.restype = None
    library.meft_rows_ascend.argtypes = [p, i, i]
    library.meft_give_way_to.argtypes, library.meft_give_way_to.restype = [p], None
    library.meft_drain.argtypes, library.meft_drain.restype = [n, n, p, p, p, i, i, n], None
    library.meft_mean_rows.argtypes, library.meft_mean_rows.restype = (
        [p, i, p, i, i, p, i, i, i, f, p, n],
        ctypes.c_double,
    )


def _choose(native: bool | None, state: RowState) -> ctypes.CDLL | None:
    copy = state.compute_copy
    own = state.table.dtype in (torch.float32, torch.bfloat16)
    fits = state.table.is_cpu and own and (copy is None or copy.dtype == torch.bfloat16)
    library = native_library() if fits and native is not False else None
    if native and library is None:
        limits = "it takes float32 and bfloat16 tables on the CPU with a bfloat16 compute copy or none"
        reason = "it was not built" if fits else limits
        raise ValueError(f"the C++ library cannot be used: {reason}.")
    return library


def _scalars(rule: StepRule) -> Tensor:
    """[11] float32: `Step` of step_values.h, computed in double as torch does; the last four are the row's own."""
    fresh = 1 - rule.beta2
    scalars = (rule.mix, float(rule.from_grad), rule.beta2, fresh, rule.eps, rule.decay, rule.coupled, *[0.0] * 4)
    return torch.tensor(scalars, dtype=torch.float64, device="cpu").to(torch.float32)


def _ascend(rows: Tensor, limit: int) -> bool:
    """Whether `rows`, on the CPU, ascend, each once, from 0 to limit - 1."""
    library = native_library()
    if library and rows.is_contiguous():
        return bool(library.meft_rows_ascend(rows.data_ptr(), len(rows), limit))
    return not len(rows) or bool(rows[0] >= 0 and rows[-1] < limit and (rows.diff() > 0).all())


def _call(
    library: ctypes.CDLL,
    state: RowState,
    rows: Tensor,
    grads: Tensor,
    steps: Tensor,
    keys: Tensor | None = None,
    factors: tuple[float, ...] = (),
) -> None:
    if grads.dtype != torch.bfloat16:
        grads = grads.to(torch.float32)
    rows, grads = rows.contiguous(), grads.contiguous()
    moments = state.exp_avg, state.exp_avg_sq, state.exp_avg_scale, state.exp_avg_sq_scale
    written = state.table, *moments, state.compute_copy
    pointers = [None if x is None else x.data_ptr() for x in (*written, grads, rows, keys)]
    first, second = (*factors, 1.0, 1.0)[:2]
    width, half, mode = state.table.shape[1], state.table.dtype == torch.bfloat16, MODES.index(state.mode)
    sizes, numbers = (len(rows), width), (first, second)
    half_grads = grads.dtype == torch.bfloat16
    library.meft_row_adamw(half, half_grads, mode, *pointers, *sizes, steps.data_ptr(), *numbers, host_threads())
    for tensor in written:
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
