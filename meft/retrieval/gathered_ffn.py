"""Rows that an engine has brought, in the autograd graph: what stands for them there, and the FFN that uses them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from adapter_kernels import sparse_ffn, sparse_ffn_backward
from peft_bridge.torch_private import graph_kept

from .second_order import ValuesOf, check_not_batched, ffn_of_picks, gradients
from .types import PendingForward


class GradientReceiver(Protocol):
    """Who takes the gradients of gathered rows: of keys (0) or values (1), [u, d]."""

    def send_back(self, begun: PendingForward, which: int, gradient: Tensor) -> Tensor:
        """The gradient of the table, which leaves for it."""

    def keep_graph(self, begun: PendingForward, which: int, gradient: Tensor) -> Tensor:
        """The same with a graph, and at once."""


class RowGradientSink(torch.autograd.Function):
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
        engine: GradientReceiver,
        begun: PendingForward,
        done: Callable[[], None],
    ) -> tuple[Tensor, Tensor]:
        ctx.engine, ctx.begun, ctx.done = engine, begun, done
        ctx.zeros = idle.new_zeros(()).expand_as(idle) if idle is not None else None
        ctx.set_materialize_grads(False)
        first, second = (key_rows.new_empty((), dtype=dtype).expand_as(key_rows) for _ in range(2))
        return first, second

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        for g in given:
            check_not_batched(g)
        send = ctx.engine.keep_graph if torch.is_grad_enabled() else ctx.engine.send_back  # create_graph=True
        made = [
            send(ctx.begun, i, g) if g is not None and ctx.needs_input_grad[i] else None for i, g in enumerate(given)
        ]
        ctx.done()
        if not graph_kept():  # picks go now, however long somebody holds the loss
            ctx.begun = None
        return *made, None, None, ctx.zeros, None, None, None


class GatheredFFN(torch.autograd.Function):
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
        # What stands for the rows takes no memory.
        ctx.save_for_backward(x, key_rows, value_rows, position, factors, keys, values)
        ctx.row_gradients = keys.dtype
        return sparse_ffn(x, key_rows, value_rows, position, factors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needs = ctx.needs_input_grad[:4]
        check_not_batched(g)
        *saved, keys, values = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return *_with_graphs(saved, (keys, values), list(needs), g), None, None, None
        grads = sparse_ffn_backward(g, *saved, needs=needs, row_gradients=ctx.row_gradients)
        return *grads, None, None, None


def _with_graphs(
    saved: list[Any], standing: tuple[Tensor, Tensor], needs: list[bool], g: Tensor
) -> list[Tensor | None]:
    """Gradients of x, keys, values and factors that can be differentiated."""
    x, key_rows, value_rows, position, factors = saved
    token, column = (position >= 0).nonzero(as_tuple=True)
    place = position[token, column].to(torch.int64)

    def function(x: Tensor, keys: Tensor, values: Tensor, factors: Tensor | None) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        w, v = (ValuesOf.apply(*each).to(wide.dtype) for each in ((keys, key_rows), (values, value_rows)))
        by_pick = factors[token, column].to(wide.dtype) if factors is not None else None
        with torch.no_grad():
            scores = (wide[token] * w[place]).sum(1) * (by_pick if by_pick is not None else 1)
        return ffn_of_picks(wide, w, v, by_pick, token, place, scores > 0).to(x.dtype)

    return gradients(function, [x, *standing, factors], needs, g)
