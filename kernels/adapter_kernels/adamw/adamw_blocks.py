"""One optimizer step of AdamW or Adam on gathered rows, in torch operations.

Each operation rounds by itself, in the order of `row_adamw_kernels` and of meft's row_adamw.cpp, so that all give the
same bits; fused torch operations (lerp, addcmul, addcdiv) would contract on some machines and not on others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .stochastic_rounding import round_stochastically

_CHUNK = 1 << 17  # values of a table in work at a time: they stay in the cache


@dataclass(frozen=True)
class StepRule:
    """The hyper-parameters of one optimizer step, as torch.optim.AdamW (`decoupled`) or Adam takes them."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool

    @property
    def decay(self) -> float:
        """The factor of decoupled weight decay; 1.0 without it."""
        return 1 - self.lr * self.weight_decay if self.decoupled else 1.0

    @property
    def coupled(self) -> float:
        """The weight decay that goes into the gradient; 0.0 if it is decoupled."""
        return 0.0 if self.decoupled else self.weight_decay

    @property
    def from_grad(self) -> bool:
        """Whether the new first moment is reckoned from the gradient or from the old moment: torch.lerp's rule."""
        return 1 - self.beta1 >= 0.5

    @property
    def mix(self) -> float:
        return -self.beta1 if self.from_grad else 1 - self.beta1


class Block:
    """Some rows of a table and its moments, gathered into buffers that stay in the cache, and stepped there."""

    def __init__(
        self, table: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, wire: Tensor | None, seed: int, most: int
    ) -> None:
        self.tables = (table, exp_avg, exp_avg_sq)
        self.wire, self.seed, self.dtype = wire, seed, exp_avg.dtype
        self.size = min(most, max(1, _CHUNK // max(1, table.shape[1])))
        self.buffers = torch.empty(6, self.size, table.shape[1], dtype=self.dtype, device=table.device)
        self.rows = torch.empty(0, dtype=torch.int64, device=table.device)

    def parts(self, count: int) -> list[slice]:
        """Slices of at most a block's rows that cover `count` rows."""
        return [slice(i, min(i + self.size, count)) for i in range(0, count, self.size)]

    def load(self, rows: Tensor, grads: Tensor) -> None:
        self.rows = rows
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
        _square_root(v, a).div_(root2).add_(rule.eps)
        p.sub_(torch.mul(m, step_size, out=b).div_(a))
        if self.tables[0].dtype == torch.bfloat16:
            round_stochastically(p, self.rows, touches, self.seed)

    def store(self) -> None:
        for target, buffer in zip(self.tables, self.buffers, strict=False):
            target.index_copy_(0, self.rows, buffer[: len(self.rows)].to(target.dtype))
        if self.wire is not None:
            self.wire.index_copy_(0, self.rows, self.buffers[0, : len(self.rows)].to(self.wire.dtype))


def _square_root(x: Tensor, out: Tensor) -> Tensor:
    """The correctly rounded square root; torch.sqrt of float32 on the CPU can be off by one ulp."""
    return out.copy_(x.double().sqrt_()) if x.is_cpu and x.dtype == torch.float32 else torch.sqrt(x, out=out)


def step_rows(
    table: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    count: Tensor,
    wire: Tensor | None,
    rows: Tensor,
    grads: Tensor,
    rule: StepRule,
    seed: int,
) -> None:
    """One step of distinct rows, at least one, each with the bias correction of its own count of touches."""
    touches = count.index_select(0, rows) + 1
    n = touches.to(torch.float64)
    block = Block(table, exp_avg, exp_avg_sq, wire, seed, len(rows))
    bias = (rule.lr / (1 - rule.beta1**n), (1 - rule.beta2**n).sqrt())
    step_size, root2 = (x.to(block.dtype).unsqueeze(1) for x in bias)
    for part in block.parts(len(rows)):
        block.load(rows[part], grads[part])
        block.step(rule, step_size[part], root2[part], touches[part])
        block.store()
    count.index_copy_(0, rows, touches)
