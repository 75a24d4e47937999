"""One AdamW step of touched rows, in place; all other rows, moments and counts keep their bits.

For a row's n-th touch, n = count + 1, with gradient g:

    m <- m + (1 - beta1)(g - m)                      p <- (1 - lr weight_decay) p
    v <- beta2 v + (1 - beta2) g g                   p <- p - lr / (1 - beta1^n) m / (sqrt(v / (1 - beta2^n)) + eps)

Not differentiable. Sums are in fp32 (float64 of float64 tables on the torch path), each operation rounded by itself in
the order below, so that the kernel, the torch path and `meft.row_update` give the same bits; the two bias corrections
are reckoned in float64. bf16 tables are rounded stochastically: the low 16 bits get noise added and are cut off, which
keeps the mean, and else most steps of a small learning rate would change nothing. The noise is a hash, splitmix64 of
(seed, row, n) and then lowbias32 over the columns: no state, and the same in any grouping of the rows.

Tables lie on the device of the rows, or in page-locked host memory for rows on a CUDA device (zero-copy: table,
moments, wire and count are each read and written over the link; see `gather_rows` for what the host must wait for).

Two kernels (`row_adamw_kernels`): `prepare`, one row a lane, counts, hashes and makes the bias corrections (beta^n by
squaring); `step` does the rest. Rows must be distinct. A row outside of 0 to r - 1 is a ValueError on the CPU and in
debug mode, and otherwise left out. Limits: r < 2^31, n < 2^31.

Source: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2; per-row counts as in `meft.row_update` (`lazy`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch, row_adamw_kernels
from .gather_rows import require_reachable, zero_copy
from .row_adamw_kernels import from_grad, variants
from .stochastic_rounding import round_stochastically

__all__ = ["row_adamw", "variants"]

_CHUNK = 1 << 17  # values of a table in work at a time on the CPU: they stay in the cache


def _torch(
    table: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, count: Tensor, wire: Tensor | None, rows: Tensor, grads: Tensor,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, seed: int,
) -> None:  # fmt: skip
    """In blocks that stay in the cache; fused torch operations would contract on some machines and not on others."""
    rows, grads, fresh = rows.to(table.device, torch.int64), grads.to(table.device), from_grad(beta1)
    low, high = (int(x) for x in rows.aminmax()) if rows.is_cpu else (0, 0)
    dispatch.require(low >= 0 and high < len(table), "rows", f"0 to {len(table) - 1} are possible, not {low} to {high}")
    block = max(1, _CHUNK // max(1, table.shape[1]))
    for start in range(0, len(rows), block):
        mine = rows[start : start + block]
        touches = count.index_select(0, mine) + 1
        count.index_copy_(0, mine, touches)
        n = touches.to(torch.float64)
        step_size = (lr / (1 - beta1**n)).to(exp_avg.dtype)[:, None]
        root2 = (1 - beta2**n).sqrt().to(exp_avg.dtype)[:, None]
        p = table.index_select(0, mine).to(exp_avg.dtype)
        m, v = exp_avg.index_select(0, mine), exp_avg_sq.index_select(0, mine)
        g = grads[start : start + block].to(exp_avg.dtype)
        moved = torch.sub(g, m).mul_(-beta1 if fresh else 1 - beta1)
        m = torch.add(g, moved) if fresh else m.add_(moved)
        v.mul_(beta2).add_(torch.mul(g, 1 - beta2, out=moved).mul_(g))
        # torch.sqrt of float32 on the CPU can be off by one unit in the last place.
        root = v.to(torch.float64, copy=True).sqrt_().to(v.dtype) if v.is_cpu else v.sqrt()
        scale = root.div_(root2).add_(eps)
        p.mul_(1 - lr * weight_decay).sub_(torch.mul(m, step_size, out=moved).div_(scale))
        if table.dtype == torch.bfloat16:
            round_stochastically(p, mine, touches, seed)
        for target, source in ((table, p), (exp_avg, m), (exp_avg_sq, v), (wire, p)):
            if target is not None:
                target.index_copy_(0, mine, source.to(target.dtype))


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
    step = _torch
    if dispatch.use_triton(impl, rows.device) and reachable:
        dispatch.require_half_or_single(table, "table")
        step = row_adamw_kernels.step
    step(table, exp_avg, exp_avg_sq, count, wire, rows, grads, lr, beta1, beta2, eps, weight_decay, seed)


@_op.register_fake
def _(
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
    seed: int,
    impl: str | None,
) -> None:
    return


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
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.
        wire: [r, d] in fp16 or bf16, where the (fp32) table is: a copy of its touched rows, rounded to the nearest.
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
        fixed.append((wire, "wire", (torch.float16, torch.bfloat16)))
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
    _op(*bare, rows, grads.detach(), lr, beta1, beta2, eps, weight_decay, seed, impl)
