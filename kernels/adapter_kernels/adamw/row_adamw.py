"""One AdamW or Adam step of touched rows, in place; all other rows, moments and counts keep their bits.

For a row's n-th touch, n = count + 1, with gradient g:

    m <- m + (1 - beta1)(g - m)                      p <- (1 - lr weight_decay) p
    v <- beta2 v + (1 - beta2) g g                   p <- p - lr / (1 - beta1^n) m / (sqrt(v / (1 - beta2^n)) + eps)

Adam has g <- g + weight_decay p before it, and 1 in place of (1 - lr weight_decay).

Not differentiable. Sums are in fp32 (float64 of float64 tables on the torch path), each operation rounded by itself in
the order of `adamw_blocks`, so that the kernel, the torch path and `meft.table.row_step` give the same bits; both bias
corrections are reckoned in float64. bf16 tables are rounded stochastically: the low 16 bits get noise added and are cut
off, which keeps the mean, and else most steps of a small learning rate would change nothing. The noise is a hash,
splitmix64 of (seed, row, n) and then lowbias32 over the columns: no state, and the same in any grouping of the rows.

Tables lie on the device of the rows, or in page-locked host memory for rows on a CUDA device (zero-copy: table,
moments, wire and count are each read and written over the link; see `gather_rows` for what the host must wait for).

Two kernels (`row_adamw_kernels`): `prepare`, one row a lane, counts, hashes and makes the bias corrections (beta^n by
squaring); `step` does the rest. Rows must be distinct. A row outside of 0 to r - 1 is a ValueError on the CPU and in
debug mode, and otherwise left out. Limits: r < 2^31, n < 2^31.

Source: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2; per-row counts as in `meft.table.row_step`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rows.gather_rows import require_reachable, zero_copy
from ..runtime import dispatch
from . import row_adamw_kernels
from .adamw_blocks import StepRule, step_rows
from .row_adamw_kernels import variants

__all__ = ["row_adamw", "variants"]


def _torch(
    table: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, count: Tensor, wire: Tensor | None, rows: Tensor, grads: Tensor,
    rule: StepRule, seed: int,
) -> None:  # fmt: skip
    rows, grads = rows.to(table.device, torch.int64), grads.to(table.device)
    low, high = (int(x) for x in rows.aminmax()) if rows.is_cpu else (0, 0)
    dispatch.require(low >= 0 and high < len(table), "rows", f"0 to {len(table) - 1} are possible, not {low} to {high}")
    step_rows(table, exp_avg, exp_avg_sq, count, wire, rows, grads, rule, seed)


@torch.library.custom_op("adapter_kernels::row_adamw", mutates_args=("table", "exp_avg", "exp_avg_sq", "count", "wire"))
def _op(
    table: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    count: Tensor,
    wire: Tensor | None,
    rows: Tensor,
    grads: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    seed: int,
    impl: str | None,
) -> None:
    reachable = zero_copy(rows.device, table=table, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, count=count, wire=wire)
    if not (len(rows) and table.numel()):
        return
    if dispatch.debug():
        inside = bool(((rows >= 0) & (rows < len(table))).all())
        dispatch.require(inside, "rows", f"rows outside of 0 to {len(table) - 1}")
        dispatch.require(len(rows.unique()) == len(rows), "rows", "a row is there twice")
    unsupported = [("table", f"the Triton kernel has no {table.dtype}")] if table.dtype == torch.float64 else []
    step = row_adamw_kernels.step if dispatch.use_triton(impl, rows.device, unsupported) and reachable else _torch
    rule = StepRule(lr, beta1, beta2, eps, weight_decay, decoupled)
    step(table, exp_avg, exp_avg_sq, count, wire, rows, grads, rule, seed)


@_op.register_fake
def _(*arguments: object) -> None:
    """It changes what it is given, and returns nothing."""


def row_adamw(
    table: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    count: Tensor,
    rows: Tensor,
    grads: Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    wire: Tensor | None = None,
    seed: int = 0,
    impl: str | None = None,
) -> None:
    """Step the touched rows of a table, its moments and counts, in place.

    Args:
        table: [r, d], fp32 or bf16 (float64 on the torch path), contiguous, on the device of the rows or, where that is
            a CUDA device, in page-locked host memory.
        exp_avg, exp_avg_sq: [r, d], fp32 (float64 if the table is), where the table is.
        count: int32 [r], how often each row was touched, where the table is.
        rows: int32 or int64 [n], distinct, contiguous.
        grads: [n, d], fp32, fp16 or bf16 (float64), contiguous, on the device of the rows.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW; `decoupled=False`: as in torch.optim.Adam.
        wire: [r, d] in fp16 or bf16 (fp32 of a float64 table), where the table is: a copy of its touched rows, rounded
            to the nearest.
        seed: of the stochastic rounding of a bf16 table.
        impl: "triton", "torch", or None: by the device of the rows.

    Raises:
        ValueError: wrong dtype, shape or device, a tensor in pageable memory or not contiguous, betas or eps out of
            range; on the CPU and in debug mode rows out of range; in debug mode rows that are not distinct.
    """
    dispatch.require_matrix(table, "table", (torch.float32, torch.bfloat16))
    wide = torch.float64 if table.dtype == torch.float64 else torch.float32
    fixed: list[tuple[Tensor, str, tuple[torch.dtype, ...]]]
    fixed = [(exp_avg, "exp_avg", (wide,)), (exp_avg_sq, "exp_avg_sq", (wide,))]
    if wire is not None:
        dispatch.require(table.dtype != torch.bfloat16, "wire", "a bf16 table is narrow itself")
        narrow = (torch.float16, torch.bfloat16, *([torch.float32] if wide == torch.float64 else []))
        fixed.append((wire, "wire", narrow))
    for tensor, name, dtypes in fixed:
        dispatch.require(tensor.dtype in dtypes, name, f"one of {dtypes} is needed, not {tensor.dtype}")
        dispatch.require(tensor.shape == table.shape, name, f"the shape {tuple(table.shape)} is needed")
    dispatch.require(
        count.dtype == torch.int32 and count.shape == table.shape[:1], "count", f"int32 [{len(table)}] is needed"
    )
    dispatch.require(rows.dim() == 1 and rows.dtype in dispatch.INTS, "rows", "int32 or int64 [n] is needed")
    dispatch.require_matrix(grads, "grads", dispatch.FLOATS, columns=table.shape[1])
    dispatch.require(len(grads) == len(rows), "grads", f"{len(grads)} rows for {len(rows)} ids")
    beta1, beta2 = betas
    dispatch.require(0 <= beta1 < 1 and 0 <= beta2 < 1, "betas", f"from 0 to below 1 are needed, not {betas}")
    dispatch.require(lr >= 0 and eps >= 0 and weight_decay >= 0, "lr", "lr, eps and weight_decay must not be negative")
    own: dict[str, Tensor | None] = {
        "table": table,
        "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg_sq,
        "count": count,
        "wire": wire,
    }
    for name, held in {**own, "rows": rows, "grads": grads}.items():
        dispatch.require(held is None or held.is_contiguous(), name, "a contiguous tensor is needed")
    dispatch.require_same_device(**own)
    dispatch.require_same_device(rows=rows, grads=grads)
    require_reachable(table, "table", rows.device)
    bare = [t.detach() if t is not None else None for t in own.values()]
    _op(*bare, rows, grads.detach(), lr, beta1, beta2, eps, weight_decay, decoupled, seed, impl)
