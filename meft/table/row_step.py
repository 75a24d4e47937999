"""AdamW and Adam on the touched rows of tables.

float32 tables on the CPU take a small C++ library, if there was a compiler at installation; all others, and machines
without it, take `adapter_kernels`: for a table on a GPU the kernel of its `row_adamw`, for all else torch operations.
All give the same bits: the same operations in the same order, each rounded. The library's threads are its own, as many
as `adapter_kernels.runtime.host_threads` says.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import Tensor

from adapter_kernels import row_adamw
from adapter_kernels.adamw.adamw_blocks import StepRule
from adapter_kernels.runtime.host_threads import host_threads

__all__ = ["StepRule", "multiplied", "native_library", "update_rows"]

_VERSION = 4  # of the library's arguments
_BLOCK = 1 << 20  # values that torch multiplies at a time
_COLUMNS = ("mix", "from_grad", "beta2", "fresh2", "eps", "decay", "coupled", "step_size", "root2")  # `Step` there


def update_rows(
    table: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    count: Tensor,
    rows: Tensor,
    grads: Tensor,
    rule: StepRule,
    *,
    wire: Tensor | None = None,
    seed: int = 0,
    factors: tuple[float, ...] = (),
    native: bool | None = None,
) -> None:
    """Take one step of the touched rows, in place; all other rows, moments and counts keep their bits.

    On a row's n-th touch its moments decay once and the bias correction uses that row's own n.

    Args:
        table: [r, d] float32, float64 or bfloat16, contiguous, on any device. bfloat16 is reckoned in float32 and
            rounded stochastically by a generator of (seed, row, count, column): the same in any grouping of the rows.
        exp_avg, exp_avg_sq: [r, d] float32, or float64 if the table is.
        count: [r] int32, how often each row was touched.
        rows: [n] int64, ascending, each once.
        grads: [n, d] in the table's dtype or float32.
        wire: [r, d], a copy of the table in a narrower dtype, rewritten for the touched rows.
        factors: at most two float32 numbers that `grads`, float32 then, count as multiplied by, in this order; they
            stay as they are.
        native: True takes the C++ library, False adapter_kernels, None (the default) the library where it applies.

    Raises:
        ValueError: arguments that do not fit together, or `native=True` where the library does not apply.
    """
    _check(table, exp_avg, exp_avg_sq, count, rows, grads, wire)
    library = _choose(native, table, wire)
    if not rows.numel():
        return
    with torch.no_grad():
        if library is None:
            for part, given in _multiplied(grads, factors):
                row_adamw(
                    table,
                    exp_avg,
                    exp_avg_sq,
                    count,
                    rows[part].contiguous(),
                    given.contiguous(),
                    lr=rule.lr,
                    betas=(rule.beta1, rule.beta2),
                    eps=rule.eps,
                    weight_decay=rule.weight_decay,
                    decoupled=rule.decoupled,
                    wire=wire,
                    seed=seed,
                )
            return
        touches = count.index_select(0, rows) + 1
        n = touches.to(torch.float64)
        steps = _scalars(rule).expand(len(rows), -1).clone()
        steps[:, -2], steps[:, -1] = rule.lr / (1 - rule.beta1**n), (1 - rule.beta2**n).sqrt()
        _call(library, table, exp_avg, exp_avg_sq, wire, rows, grads, steps, factors)
        count.index_copy_(0, rows, touches)


def _multiplied(grads: Tensor, factors: tuple[float, ...]) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their multiplied gradients, in blocks, so that no second gradient comes into being."""
    each = max(1, _BLOCK // max(1, grads.shape[1])) if factors else len(grads)
    for start in range(0, len(grads), each):
        part = slice(start, start + each)
        yield part, multiplied(grads[part], factors)


def multiplied(values: Tensor, factors: tuple[float, ...], out: Tensor | None = None) -> Tensor:
    """Values times each of the factors, in their order.

    Args:
        out: takes them; None: new memory, where there are factors.
    """
    for factor in factors:
        values = out = torch.mul(values, factor, out=out)
    return values if out is None or values is out else out.copy_(values)


def _check(
    table: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    counter: Tensor,
    rows: Tensor,
    grads: Tensor,
    wire: Tensor | None,
) -> None:
    wide = torch.promote_types(table.dtype, torch.float32)
    if table.dim() != 2 or table.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise ValueError(f"a table is [r, d] in float32, float64 or bfloat16, not {table.dtype} {list(table.shape)}.")
    copies = [("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq), ("wire", wire)]
    for name, x in [("table", table), *copies]:
        if x is not None and (x.shape != table.shape or x.device != table.device or not x.is_contiguous()):
            raise ValueError(f"{name} must be contiguous, {list(table.shape)} and on {table.device}.")
    if exp_avg.dtype != wide or exp_avg_sq.dtype != wide:
        raise ValueError(f"the moments of a {table.dtype} table are {wide}.")
    if counter.shape != table.shape[:1] or counter.dtype != torch.int32 or counter.device != table.device:
        raise ValueError(f"the rows' counts must be int32 [{len(table)}] on {table.device}.")
    if rows.dim() != 1 or rows.dtype != torch.int64 or rows.device != table.device:
        raise ValueError(f"rows must be int64 [n] on {table.device}.")
    if grads.shape != (len(rows), table.shape[1]) or grads.device != table.device:
        raise ValueError(f"grads must be [{len(rows)}, {table.shape[1]}] on {table.device}, not {list(grads.shape)}.")
    if grads.dtype not in (table.dtype, torch.float32):
        raise ValueError(f"grads must be {table.dtype} or float32, not {grads.dtype}.")
    # On a device the look would wait for it; there, the kernel leaves such a row out, and torch has its own check.
    if rows.is_cpu and not _ascend(rows, len(table)):
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
    except (ImportError, OSError, AttributeError):
        return None
    declare(library)
    return library


def declare(library: ctypes.CDLL) -> None:
    """Tell ctypes the arguments of the library's functions."""
    p, i, f, n = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    library.meft_row_adamw.argtypes = [p, p, p, p, p, p, i, i, p, f, f, n]
    library.meft_row_adamw.restype = None
    library.meft_rows_ascend.argtypes = [p, i, i]
    for drain in (library.meft_drain_bfloat16, library.meft_drain_float):
        drain.argtypes, drain.restype = [p, p, i, i, n], ctypes.c_double
    library.meft_squares.argtypes, library.meft_squares.restype = [p, i, i, n], ctypes.c_double


def _choose(native: bool | None, table: Tensor, wire: Tensor | None) -> ctypes.CDLL | None:
    fits = table.is_cpu and table.dtype == torch.float32 and (wire is None or wire.dtype == torch.bfloat16)
    library = native_library() if fits and native is not False else None
    if native and library is None:
        why = "it was not built" if fits else "it takes float32 tables on the CPU with a bfloat16 wire or none"
        raise ValueError(f"the C++ library cannot be used: {why}.")
    return library


def _scalars(rule: StepRule) -> Tensor:
    """[9] float32: the scalars of a step, reckoned in double as torch does; the last two depend on the row's count."""
    own = (rule.mix, float(rule.from_grad), rule.beta2, 1 - rule.beta2, rule.eps, rule.decay, rule.coupled, 0.0, 0.0)
    return torch.tensor(own, dtype=torch.float64, device="cpu").to(torch.float32)


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _ascend(rows: Tensor, limit: int) -> bool:
    """Whether `rows`, on the CPU, ascend, each once, from 0 to limit - 1."""
    library = native_library()
    if library and rows.is_contiguous():
        return bool(library.meft_rows_ascend(rows.data_ptr(), len(rows), limit))
    return not len(rows) or bool(rows[0] >= 0 and rows[-1] < limit and (rows.diff() > 0).all())


def _call(
    library: ctypes.CDLL,
    table: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    wire: Tensor | None,
    rows: Tensor,
    grads: Tensor,
    steps: Tensor,
    factors: tuple[float, ...] = (),
) -> None:
    first, second = (*factors, 1.0, 1.0)[:2]
    held = [None if x is None else x.contiguous() for x in (table, exp_avg, exp_avg_sq, wire, grads, rows)]
    pointers = [_address(x) for x in held]
    library.meft_row_adamw(*pointers, len(rows), table.shape[1], steps.data_ptr(), first, second, host_threads())
    for changed in (table, exp_avg, exp_avg_sq, wire):
        if changed is not None and not changed.is_inference():
            torch.autograd.graph.increment_version(changed)
