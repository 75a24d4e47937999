"""Rows that an engine has brought, in the autograd graph: what stands for them there, and the FFN that uses them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adapter_kernels import sparse_ffn, sparse_ffn_backward

from .context import graph_kept

if TYPE_CHECKING:
    from .engine import Begun, Engine


class BroughtRows(torch.autograd.Function):
    """Rows that were brought, as a function of their tables.

    What stands for the rows in the graph, [u, d], has the dtype of their gradients and no memory: autograd rounds a
    gradient to the dtype of what it is the gradient of.
    """

    @staticmethod
    def forward(
        ctx: Any,
        keys: Tensor,
        values: Tensor,
        key_rows: Tensor,
        dtype: torch.dtype,
        idle: Tensor | None,
        engine: Engine,
        begun: Begun,
        done: Callable[[], None],
    ) -> tuple[Tensor, Tensor]:
        ctx.engine, ctx.begun, ctx.done = engine, begun, done
        ctx.zeros = idle.new_zeros(()).expand_as(idle) if idle is not None else None
        ctx.set_materialize_grads(False)
        first, second = (key_rows.new_empty((), dtype=dtype).expand_as(key_rows) for _ in range(2))
        return first, second

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        made = [
            ctx.engine.send_back(ctx.begun, i, g) if g is not None and ctx.needs_input_grad[i] else None
            for i, g in enumerate(gradients)
        ]
        ctx.done()
        if not graph_kept():  # picks go now, however long somebody holds the loss
            ctx.begun = None
        return *made, None, None, ctx.zeros, None, None, None


class BroughtFFN(torch.autograd.Function):
    """`sparse_ffn` of rows; their gradients go to what stands for them, in its dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        factors: Tensor | None,
        key_rows: Tensor,
        value_rows: Tensor,
        position: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, key_rows, value_rows, position, factors)
        ctx.row_gradients = keys.dtype
        return sparse_ffn(x, key_rows, value_rows, position, factors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needs = ctx.needs_input_grad[:4]
        grads = sparse_ffn_backward(g, *ctx.saved_tensors, needs=needs, row_gradients=ctx.row_gradients)
        return *grads, None, None, None
