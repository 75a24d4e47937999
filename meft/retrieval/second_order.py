"""Backward passes that are to be differentiated themselves (`create_graph=True`): in plain torch operations.

Autograd differentiates those as often as it likes; they hold the rows of each pick at once, [picks, d], so that they
take more memory than the fast ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from peft_bridge.torch_private import has_tangent, is_batched, is_transformed

from ..gradient.row_gradient import RowGradient


def check_not_transformed(tensors: Iterable[Tensor]) -> None:
    """Raises: NotImplementedError: a transform of torch.func, or forward-mode differentiation, goes through a layer."""
    if is_transformed():
        raise NotImplementedError(
            "MEFT layers do not take part in torch.func's transforms (grad, vjp, jvp, vmap, hessian): use "
            "torch.autograd, with create_graph=True for further derivatives."
        )
    if has_tangent(tensors):
        raise NotImplementedError(
            "MEFT layers have no forward-mode derivative: use torch.autograd.functional.jvp, which goes backward twice."
        )


def check_not_batched(gradient: Tensor | None) -> None:
    """Raises: NotImplementedError: a backward pass goes through a layer for several gradients at once."""
    if gradient is None:
        return
    if is_batched(gradient):
        raise NotImplementedError(
            "MEFT's backward pass takes one gradient at a time: leave out is_grads_batched=True (vectorize=True of "
            "torch.autograd.functional)."
        )


class AsRowGradient(torch.autograd.Function):
    """Gradients of some rows [u, d] as the gradient of their table, which can be differentiated."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: Tensor, table: Tensor) -> RowGradient:
        ctx.rows, ctx.device, ctx.dtype = rows, values.device, values.dtype
        wide = values.detach().to(table.device, torch.promote_types(table.dtype, torch.float32), copy=True)
        return RowGradient(rows, wide, table)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        check_not_batched(g)
        if isinstance(g, RowGradient):
            if torch.is_grad_enabled() and g.requires_grad:
                raise NotImplementedError(
                    "MEFT has no third derivatives by rows: leave out create_graph=True where second ones are taken."
                )
            g = g.to_dense()
        return g.index_select(0, ctx.rows).to(ctx.device, ctx.dtype), None, None


class RowsOf(torch.autograd.Function):
    """Rows of a table that were read already, as a function of the table; their gradient is rounded to `dtype`."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, values: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.table, ctx.rows, ctx.dtype = table, rows, dtype
        return values.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return AsRowGradient.apply(g.to(ctx.dtype), ctx.rows, ctx.table), None, None, None


def gradients(
    function: Callable[..., Tensor], inputs: list[Tensor | None], needs: list[bool], g: Tensor
) -> list[Tensor | None]:
    """Gradients, with graphs, of a function's inputs for the gradient g of its output."""
    # Aliases: an input may be made of another one, and what goes that way is added up elsewhere.
    own = [x.view_as(x) if x is not None and x.requires_grad else x for x in inputs]
    wanted = {i: x for i, x in enumerate(own) if needs[i] and x is not None and x.requires_grad}
    if not wanted:
        return [None] * len(inputs)
    y = function(*own)
    found = torch.autograd.grad(y, list(wanted.values()), g.to(y.dtype), create_graph=True, materialize_grads=True)
    made = dict(zip(wanted, found, strict=True))
    return [made.get(i) for i in range(len(inputs))]


def ffn_of_picks(
    x: Tensor, keys: Tensor, values: Tensor, factors: Tensor | None, token: Tensor, place: Tensor, active: Tensor
) -> Tensor:
    """sum over the picks of a token of ReLU(s) v: [T, d].

    Args:
        x: [T, d]. keys, values: [u, d]. factors: [n], of each pick, or None. token, place: int64 [n], of each pick.
        active: bool [n], whether its score is above 0.
    """
    dots = (x.index_select(0, token) * keys.index_select(0, place)).sum(1)
    scores = dots * factors if factors is not None else dots
    weights = torch.where(active, scores, 0.0)
    return torch.zeros_like(x).index_add(0, token, weights.unsqueeze(1) * values.index_select(0, place))
