"""The FFN of gathered rows in the autograd graph: its output, and gradients that leave for the tables.

With g = dL/dy, c_j the router's logit of neuron j's expert (1 without the factor), s_j = c_j (x . w_j) and
a_j = ReLU(s_j):

    y = sum_j a_j v_j                        dV_j = sum over tokens of a_j g
    ds_j = (v_j . g) 1[s_j > 0]              dW_j = sum over tokens of ds_j c_j x
    dx = sum_j ds_j c_j w_j                  dc_j = ds_j (x . w_j)

(arXiv 2406.04984; the picks are constants.) The products are `adapter_kernels.sparse_ffn`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from adapter_kernels import sparse_ffn, sparse_ffn_backward, table_ffn, table_ffn_backward
from peft_bridge.torch_private import graph_kept

from ..gradient.row_gradient import RowGradient
from .second_order import RowsOf, check_not_batched, ffn_of_picks, gradients
from .types import GatheredRows, PendingForward, check_versions


class GradientReceiver(Protocol):
    """Who takes the gradients of gathered rows: of keys (0) or values (1), [u, d]."""

    def send_back(self, pending: PendingForward, which: int, gradient: Tensor) -> RowGradient:
        """The gradient of the table, which leaves for it."""

    def keep_graph(self, pending: PendingForward, which: int, gradient: Tensor) -> RowGradient:
        """The same with a graph, and at once."""


def output_of(x: Tensor, factors: Tensor | None, rows: GatheredRows) -> Tensor:
    """The output for x [T, d], without a graph; arguments as of `SparseFFN.forward`."""
    if rows.scores is not None:
        return table_ffn(rows.values, rows.position, rows.scores)
    return sparse_ffn(x, rows.keys, rows.values, rows.position, factors)


class SparseFFN(torch.autograd.Function):
    """sum_{j in J} ReLU(s_j) v_j over gathered rows; gradients of the tables are `RowGradient`s."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        factors: Tensor | None,
        idle: Tensor | None,
        keys: Tensor,
        values: Tensor,
        rows: GatheredRows,
        pending: PendingForward,
        receiver: GradientReceiver,
        dtype: torch.dtype,
        done: Callable[[], None],
    ) -> Tensor:
        """The forward pass.

        Args:
            x: [T, d].
            factors: the router's logit of each pick's expert, [T, K], or None where scores carry no factor.
            idle: what gets a gradient of zero, or None.
            keys, values: the tables [r, d] that get the gradients; they are not read.
            rows: of x's dtype, [u, d], or whole tables.
            dtype: of row gradients: autograd would round them to the rows'.
            done: called when the gradients of the rows have been made.

        Returns:
            [T, d] of x's dtype.
        """
        ctx.pending, ctx.receiver, ctx.dtype, ctx.done = pending, receiver, dtype, done
        ctx.zeros = idle.new_zeros(()).expand_as(idle) if idle is not None else None
        ctx.tables = keys, values
        read = rows.keys, rows.values
        # Whole tables are nothing that a hook on saved tensors may copy.
        ctx.read, saved = (read, ()) if rows.scores is not None else (None, read)
        ctx.save_for_backward(x, factors, *saved)
        return output_of(x, factors, rows)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, factors, *read = ctx.saved_tensors
        pending: PendingForward = ctx.pending
        selection, needs = pending.known, ctx.needs_input_grad
        check_not_batched(g)
        if pending.layer.choice is not None:
            pending.layer.choice.note(selection.rows, selection.position)
        if ctx.read is not None:
            check_versions(pending.versions, pending.layer.versions)
            read = ctx.read
        key_rows, value_rows = read
        if torch.is_grad_enabled():  # create_graph=True
            made, send = _with_graphs(ctx, g, x, factors, read), ctx.receiver.keep_graph
        else:
            wanted = (needs[0], needs[3], needs[4], needs[1])
            if ctx.read is not None:
                assert selection.picks is not None
                picked = (selection.picks.ids, selection.picks.dots, factors, selection.position, len(selection.rows))
                layer = pending.layer
                with layer.keys.lock, layer.values.lock:  # another thread may step them
                    found = table_ffn_backward(g, x, key_rows, value_rows, *picked, needs=wanted)
                check_versions(pending.versions, layer.versions)  # or may have just done so
            else:
                found = sparse_ffn_backward(
                    g, x, key_rows, value_rows, selection.position, factors, needs=wanted, row_gradients=ctx.dtype
                )
            dx, dkeys, dvalues, dfactors = found
            made, send = [dx, dfactors, dkeys, dvalues], ctx.receiver.send_back
        dx, dfactors, *by_row = made
        sent = [send(pending, i, d) if d is not None else None for i, d in enumerate(by_row)]
        ctx.done()
        if not graph_kept():  # picks go now, however long somebody holds the loss
            ctx.pending = ctx.read = None
        return dx, dfactors, ctx.zeros, *sent, None, None, None, None, None


def _with_graphs(ctx: Any, g: Tensor, x: Tensor, factors: Tensor | None, rows: Any) -> list[Tensor | None]:
    """Gradients of x, factors and the rows of keys and values that can be differentiated."""
    selection = ctx.pending.known
    if ctx.read is not None:
        rows = [table.detach().index_select(0, selection.host_rows) for table in rows]
    token, column = (selection.position >= 0).nonzero(as_tuple=True)
    place = selection.position[token, column].to(torch.int64)
    by_table = zip(ctx.tables, rows, strict=True)
    row_tensors = [RowsOf.apply(table, read, selection.host_rows, ctx.dtype) for table, read in by_table]

    def function(x: Tensor, factors: Tensor | None, keys: Tensor, values: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        w, v = keys.to(wide.dtype), values.to(wide.dtype)
        by_pick = factors[token, column].to(wide.dtype) if factors is not None else None
        with torch.no_grad():
            scores = (wide[token] * w[place]).sum(1) * (by_pick if by_pick is not None else 1)
        return ffn_of_picks(wide, w, v, by_pick, token, place, scores > 0).to(x.dtype)

    needs = ctx.needs_input_grad
    return gradients(function, [x, factors, *row_tensors], [needs[0], needs[1], needs[3], needs[4]], g)
