"""One AdamW or Adam step of touched rows, in place; all other rows, moments and counts keep their bits.

For a row's n-th touch, n = count + 1, with gradient g:

    m <- m + (1 - beta1)(g - m)                      p <- (1 - lr weight_decay) p
    v <- beta2 v + (1 - beta2) g g                   p <- p - lr / (1 - beta1^n) m / (sqrt(v / (1 - beta2^n)) + eps)

Adam has g <- g + weight_decay p before it, and 1 in place of (1 - lr weight_decay).

Not differentiable. Sums are in fp32 (float64 of float64 tables on the torch path), each operation rounded by itself in
the order of `row_adamw_torch`, so that the kernel, the torch path and `meft.table.row_step` give the same bits; both
bias corrections are computed in float64. bf16 tables are rounded stochastically, as otherwise most steps of a small
learning rate would change nothing: noise is added to the low 16 bits before they are cut off, which keeps the mean. The
noise is a hash, splitmix64 of (seed, row, n) and then lowbias32 over the columns: it needs no state and is the same in
any grouping of the rows.

The state lies on the device of the rows, or in page-locked host memory for rows on a CUDA device (zero-copy: its
tensors are read and written over the link; see `gather_rows` for what the host must wait for).

Two kernels (`row_adamw_triton`): `prepare`, one row a lane, counts, hashes and makes the bias corrections (beta^n by
squaring); `step` does the rest. Rows must be distinct. A row outside of 0 to r - 1 is a ValueError on the CPU and in
debug mode, and otherwise left out. Limits: r < 2^31, n < 2^31.

Source: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2; per-row counts as in `meft.table.row_step`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rows.gather_rows import require_reachable, zero_copy
from ..runtime import dispatch
from . import row_adamw_torch, row_adamw_triton
from .row_state import RowState, StepRule


@torch.library.custom_op("adapter_kernels::row_adamw", mutates_args=RowState._fields)
def _op(
    table: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    counts: Tensor,
    compute_copy: Tensor | None,
    exp_avg_scale: Tensor | None,
    exp_avg_sq_scale: Tensor | None,
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
    ids: Tensor | None = None,
) -> None:
    state = RowState(table, exp_avg, exp_avg_sq, counts, compute_copy, exp_avg_scale, exp_avg_sq_scale)
    reachable = zero_copy(rows.device, **state._asdict())
    if not (len(rows) and table.numel()):
        return
    if dispatch.debug():
        inside = bool(((rows >= 0) & (rows < len(table))).all())
        dispatch.require(inside, "rows", f"rows outside of 0 to {len(table) - 1}")
        dispatch.require(len(rows.unique()) == len(rows), "rows", "a row is there twice")
    unsupported = [("table", f"the Triton kernel has no {table.dtype}")] if table.dtype == torch.float64 else []
    if state.mode != "float32":
        unsupported.append(("exp_avg_sq", f"the Triton kernel has no moments in mode {state.mode!r}"))
    if ids is not None and state.table.dtype == torch.bfloat16:
        unsupported.append(("ids", "the Triton kernel rounds by the rows"))
    by_kernel = dispatch.use_triton(impl, rows.device, unsupported) and reachable
    rule = StepRule(lr, beta1, beta2, eps, weight_decay, decoupled)
    if by_kernel:
        row_adamw_triton.step(state, rows, grads, rule, seed)
    else:
        row_adamw_torch.step(state, rows, grads, rule, seed, ids)


@_op.register_fake
def _(*arguments: object) -> None:
    """It changes what it is given, and returns nothing."""


def row_adamw(
    state: RowState, rows: Tensor, grads: Tensor, rule: StepRule, *, seed: int = 0, impl: str | None = None,
    ids: Tensor | None = None,
) -> None:  # fmt: skip
    """Step the touched rows of a table, its moments and counts, in place.

    Args:
        state: on the device of the rows or, where that is a CUDA device, in page-locked host memory. float64 tables
            take the torch path.
        rows: int32 or int64 [n], distinct, contiguous.
        grads: [n, d], fp32, fp16 or bf16 (float64), contiguous, on the device of the rows.
        rule: AdamW's, or with `decoupled=False` Adam's.
        seed: of the stochastic rounding of a bf16 table.
        impl: "triton", "torch", or None: by the device of the rows.
        ids: int64 [n] on the device of the rows, of which the noise of stochastic rounding is made; None: `rows`. Rows
            that are kept elsewhere than at their place in the table give equal bits with it.

    Raises:
        ValueError: wrong dtype, shape or device, a tensor in pageable memory or not contiguous, a rule that is out of
            range; on the CPU and in debug mode rows out of range; in debug mode rows that are not distinct.
    """
    state.check()
    dispatch.require(rows.dim() == 1 and rows.dtype in dispatch.INTS, "rows", "int32 or int64 [n] is needed")
    dispatch.require_matrix(grads, "grads", dispatch.FLOATS, columns=state.table.shape[1])
    dispatch.require(len(grads) == len(rows), "grads", f"{len(grads)} rows for {len(rows)} ids")
    for name, tensor in (("rows", rows), ("grads", grads)):
        dispatch.require(tensor.is_contiguous(), name, "a contiguous tensor is needed")
    dispatch.require_same_device(rows=rows, grads=grads)
    require_reachable(state.table, "table", rows.device)
    if ids is not None:
        fits = ids.shape == rows.shape and ids.dtype == torch.int64 and ids.device == rows.device
        dispatch.require(fits, "ids", f"int64 {tuple(rows.shape)} on {rows.device} is needed")
    rule.check()
    tensors = [t.detach() if t is not None else None for t in state]
    hyper_parameters = rule.lr, rule.beta1, rule.beta2, rule.eps, rule.weight_decay, rule.decoupled
    _op(*tensors, rows, grads.detach(), *hyper_parameters, seed, impl, ids)
