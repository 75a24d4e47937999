"""The FFN of the picked neurons, forward and backward, over rows that were brought together.

With g = dL/dy, c_j the router's logit of neuron j's expert (1 without the factor), s_j = c_j (x . w_j) and
a_j = ReLU(s_j):

    y = sum_j a_j v_j                        dV_j = sum over tokens of a_j g
    ds_j = (v_j . g) 1[s_j > 0]              dW_j = sum over tokens of ds_j c_j x
    dx = sum_j ds_j c_j w_j + W_g^T dp       dp_e = sum_{j in e} ds_j (x . w_j),  dW_g = dp^T x

(arXiv 2406.04984; the picks are constants.) The sums over picks are products with a sparse [T, rows] matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adapter_kernels.ffn.sparse_products import column_sums, entry_dots, line_sums
from peft_bridge.torch_private import graph_kept

from ..gradient.row_gradient import RowGradient
from ..routing.topk import Selection
from .second_order import AsRowGradient, RowsOf, check_not_batched, ffn_of_picks, gradients


@dataclass(frozen=True)
class Retrieved:
    """Picks together with the rows that they read.

    Attributes:
        selection: the picks, on the device of the computation.
        keys, values: [m, d] of any floating dtype: whole tables, or only the rows of the union.
        place: int64 [n], for each pick its row in `keys` and `values`.
        rows: int64 [u], the union: ids of the touched neurons, ascending, on the device of the tables.
        order: int64 [n], for each pick its place in `rows`.
        in_place: whether `keys` and `values` are the tables themselves and no copies.
    """

    selection: Selection
    keys: Tensor
    values: Tensor
    place: Tensor
    rows: Tensor
    order: Tensor
    in_place: bool


def check_versions(seen: tuple[int, int], now: tuple[int, int]) -> None:
    """Raises: RuntimeError: keys or values were updated since a forward pass read them."""
    if seen != now:
        raise RuntimeError(
            "MEFT rows were updated between this forward pass and its backward pass: call backward() before step()."
        )


def weighted_rows(weights: Tensor, selection: Selection, place: Tensor, rows: Tensor) -> Tensor:
    """sum_j weights_j rows[place_j] over the picks of each token: [T, d]."""
    return line_sums(selection.starts, place, selection.token, weights, rows.to(weights.dtype))


def row_dots(x: Tensor, selection: Selection, place: Tensor, rows: Tensor) -> Tensor:
    """x_t . rows[place_j] for each pick: [n]."""
    return entry_dots(selection.starts, place, selection.token, x, rows.to(x.dtype))


def token_sums(weights: Tensor, selection: Selection, order: Tensor, x: Tensor, rows: int) -> Tensor:
    """sum of weights_j x_t over the picks of each row: [rows, d]."""
    return column_sums(order, selection.token, weights, x, rows)


class SparseFFN(torch.autograd.Function):
    """sum_{j in J} ReLU(s_j) v_j of the retrieved picks; gradients of the tables are `RowGradient`s."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        router: Tensor,
        keys: Tensor,
        values: Tensor,
        retrieved: Retrieved,
        logits: Tensor | None,
        on_backward: Callable[[int], None] | None = None,
    ) -> Tensor:
        """The forward pass.

        Args:
            x: [T, d], float32 or float64.
            router: W_g, [E, d].
            keys, values: the tables [r, d] that get the gradients; they are not read.
            retrieved: the picks and their rows.
            logits: W_g x, [T, E], or None where scores carry no factor.
            on_backward: called with the number of touched rows when their gradients have been made.

        Returns:
            [T, d] of x's dtype.
        """
        picks = retrieved.selection
        dots = picks.dots if picks.dots is not None else row_dots(x, picks, retrieved.place, retrieved.keys)
        expert = torch.div(picks.neuron, len(keys) // len(router), rounding_mode="floor")
        factor = logits[picks.token, expert] if logits is not None else None
        scores = dots * factor if factor is not None else dots
        active = scores.relu()
        ctx.retrieved, ctx.tables = retrieved, (keys, values)
        read: tuple[Tensor | None, ...] = (None, None)
        if not retrieved.in_place:
            # Copies are saved through autograd, so that its hooks (offloading, checkpointing) can drop them; of whole
            # tables they must not take hold.
            read = (retrieved.keys, retrieved.values)
            nothing = x.new_empty(0)
            ctx.retrieved = replace(retrieved, keys=nothing, values=nothing)
        ctx.save_for_backward(x, router, dots, factor, active, expert, *read)
        ctx.on_backward, ctx.router_factor = on_backward, logits is not None
        ctx.versions = (keys._version, values._version)
        return weighted_rows(active, picks, retrieved.place, retrieved.values)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, router, dots, factor, active, expert, key_rows, value_rows = ctx.saved_tensors
        retrieved: Retrieved = ctx.retrieved
        if retrieved.in_place:
            key_rows, value_rows = retrieved.keys, retrieved.values
        picks, u = retrieved.selection, len(retrieved.rows)
        keys, values = ctx.tables
        if retrieved.in_place:
            check_versions(ctx.versions, (keys._version, values._version))
        check_not_batched(g)
        if torch.is_grad_enabled():  # create_graph=True
            made = _with_graphs(ctx, g, x, router, expert, active, key_rows, value_rows)
            if ctx.on_backward is not None:
                ctx.on_backward(u)
            return *made, None, None, None
        g = g.contiguous().to(x.dtype)
        ds = row_dots(g, picks, retrieved.place, value_rows) * (active > 0)
        by_key = ds * factor if factor is not None else ds
        dx = drouter = dkeys = dvalues = None
        if factor is not None and (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]):
            dp = x.new_zeros(picks.tokens * len(router))
            dp = dp.index_add_(0, picks.token * len(router) + expert, ds * dots).view(picks.tokens, len(router))
        if ctx.needs_input_grad[0]:
            dx = weighted_rows(by_key, picks, retrieved.place, key_rows)
            if factor is not None:
                dx = dx.addmm(dp, router.to(x.dtype))
        if ctx.needs_input_grad[1]:
            drouter = (dp.T @ x).to(router.dtype) if factor is not None else torch.zeros_like(router)
        if ctx.needs_input_grad[2]:
            dkeys = _row_gradient(token_sums(by_key, picks, retrieved.order, x, u), retrieved.rows, keys)
        if ctx.needs_input_grad[3]:
            dvalues = _row_gradient(token_sums(active, picks, retrieved.order, g, u), retrieved.rows, values)
        if ctx.on_backward is not None:
            ctx.on_backward(u)
        if not graph_kept():  # picks go now, however long somebody holds the loss
            ctx.retrieved = None
        return dx, drouter, dkeys, dvalues, None, None, None


def _with_graphs(
    ctx: Any, g: Tensor, x: Tensor, router: Tensor, expert: Tensor, active: Tensor, key_rows: Tensor, value_rows: Tensor
) -> list[Tensor | None]:
    """Gradients as of `backward`, which can be differentiated."""
    retrieved: Retrieved = ctx.retrieved
    keys, values = ctx.tables
    picks, rows, near = retrieved.selection, retrieved.rows, []
    for table, read in ((keys, key_rows), (values, value_rows)):
        read = read.detach().index_select(0, rows) if retrieved.in_place else read
        near.append(RowsOf.apply(table, read, rows))

    def function(x: Tensor, router: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        factors = F.linear(x, router.to(x.dtype))[picks.token, expert] if ctx.router_factor else None
        return ffn_of_picks(x, keys, values, factors, picks.token, retrieved.order, active > 0)

    dx, drouter, *by_row = gradients(function, [x, router, *near], list(ctx.needs_input_grad[:4]), g)
    tables = zip(by_row, (keys, values), strict=True)
    return [dx, drouter, *(AsRowGradient.apply(d, rows, table) if d is not None else None for d, table in tables)]


def _row_gradient(sums: Tensor, rows: Tensor, table: Tensor) -> RowGradient:
    return RowGradient(rows, sums.to(table.device), table)
