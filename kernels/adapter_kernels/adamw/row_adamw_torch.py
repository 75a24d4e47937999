"""One optimizer step of AdamW or Adam on gathered rows, in torch operations.

Each operation rounds by itself, in the order of `row_adamw_triton` and of meft's row_adamw.cpp, so that all give the
same bits; fused torch operations (lerp, addcmul, addcdiv) would contract on some machines and not on others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime import dispatch
from . import narrow_step
from .row_state import RowState, StepRule
from .square_root import square_root
from .stochastic_rounding import round_stochastically

_BLOCK = 1 << 17  # values of a table at a time: they stay in the cache


class Block:
    """Some rows of a table and its moments, gathered into buffers that stay in the cache, and stepped there."""

    def __init__(self, state: RowState, seed: int, most: int) -> None:
        table = state.table
        self.state, self.seed, self.dtype = state, seed, state.exp_avg.dtype
        self.tables = (table, state.exp_avg, state.exp_avg_sq)
        self.size = min(most, max(1, _BLOCK // max(1, table.shape[1])))
        self.buffers = torch.empty(6, self.size, table.shape[1], dtype=self.dtype, device=table.device)
        self.rows = self.ids = torch.empty(0, dtype=torch.int64, device=table.device)

    def parts(self, count: int) -> list[slice]:
        """Slices of at most a block's rows that cover `count` rows."""
        return [slice(i, min(i + self.size, count)) for i in range(0, count, self.size)]

    def load(self, rows: Tensor, grads: Tensor, ids: Tensor) -> None:
        """Gather rows, int64 [n], and copy their gradients, [n, d]; ids: int64 [n], what the noise is made of."""
        self.rows, self.ids = rows, ids
        for source, buffer in zip(self.tables, self.buffers, strict=False):
            if source.dtype == buffer.dtype:
                torch.index_select(source, 0, rows, out=buffer[: len(rows)])
            else:
                buffer[: len(rows)].copy_(source.index_select(0, rows))
        self.buffers[3, : len(rows)].copy_(grads)

    def step(self, rule: StepRule, step_size: Tensor, root2: Tensor, touches: Tensor) -> None:
        """Step the rows; `step_size`, `root2` [n, 1]: bias corrections; `touches` [n]: the rows' counts."""
        p, m, v, grad, a, b = self.buffers[:, : len(self.rows)]
        if rule.coupled:
            grad = torch.mul(p, rule.coupled, out=b).add_(grad)
        if rule.decay != 1:
            p.mul_(rule.decay)
        torch.sub(grad, m, out=a).mul_(rule.mix)
        if rule.from_grad:
            torch.add(grad, a, out=m)
        else:
            m.add_(a)
        v.mul_(rule.beta2).add_(torch.mul(grad, 1 - rule.beta2, out=a).mul_(grad))
        square_root(v, a).div_(root2).add_(rule.eps)
        p.sub_(torch.mul(m, step_size, out=b).div_(a))
        if self.state.table.dtype == torch.bfloat16:
            round_stochastically(p, self.ids, touches, self.seed)

    def store(self) -> None:
        """Write the rows back."""
        for target, buffer in zip(self.tables, self.buffers, strict=False):
            target.index_copy_(0, self.rows, buffer[: len(self.rows)].to(target.dtype))
        copy = self.state.compute_copy
        if copy is not None:
            copy.index_copy_(0, self.rows, self.buffers[0, : len(self.rows)].to(copy.dtype))


def step(state: RowState, rows: Tensor, grads: Tensor, rule: StepRule, seed: int, ids: Tensor | None = None) -> None:
    """One step of distinct rows, at least one, each with the bias correction of its own count of touches.

    Args:
        ids: int64 [n], what the noise of stochastic rounding is made of; None: `rows`.

    Raises:
        ValueError: rows on the CPU are out of range.
    """
    table, counts = state.table, state.counts
    rows, grads = rows.to(table.device, torch.int64), grads.to(table.device)
    ids = rows if ids is None else ids.to(table.device, torch.int64)
    low, high = (int(x) for x in rows.aminmax()) if rows.is_cpu else (0, 0)
    dispatch.require(low >= 0 and high < len(table), "rows", f"0 to {len(table) - 1} are possible, not {low} to {high}")
    touches = counts.index_select(0, rows) + 1
    corrections = rule.corrections(touches)
    if state.mode != "float32":
        size = max(1, _BLOCK // max(1, table.shape[1]))
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            narrow_step.step(
                state, rows[part], grads[part], rule, corrections.part(part), touches[part], seed, ids[part]
            )
        counts.index_copy_(0, rows, touches)
        return
    block = Block(state, seed, len(rows))
    step_size, root2 = (x.to(block.dtype).unsqueeze(1) for x in (corrections.step_size, corrections.root2))
    for part in block.parts(len(rows)):
        block.load(rows[part], grads[part], ids[part])
        block.step(rule, step_size[part], root2[part], touches[part])
        block.store()
    counts.index_copy_(0, rows, touches)
