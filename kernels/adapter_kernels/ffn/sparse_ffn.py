"""The FFN of the picked neurons over gathered rows: y = base + sum_j ReLU(s_j) v_j.

For token t, its picks j = 0 to K - 1, u = position[t, j] the compact row of a pick (-1: none) and c its router factor
(1 without factors):

    s_tj = c_tj (x_t . keys_u)                    y_t = base_t + sum_j ReLU(s_tj) values_u

Gradient, with g = dL/dy and ds_tj = (values_u . g_t) 1[s_tj > 0]; sums run over the picks that are not none:

    dx_t = sum_j ds_tj c_tj keys_u                dvalues_u = sum over the tokens that picked u of ReLU(s) g_t
    dc_tj = ds_tj (x_t . keys_u)                  dkeys_u   = sum over the tokens that picked u of ds c x_t
    dbase = g

The gradient of an expert's logit, dp_e, is the sum of dc over the picks of e: autograd makes it where `factors` are
`logits.gather(1, expert of each pick)`. Which rows were picked has no gradient. Scores are computed again backward:
keeping them would cost a [T, U] tensor a layer.

Kernels: a masked form on tensor cores (`sparse_ffn_triton`), and one that reads each token's rows for the few tokens of
decoding (`sparse_ffn_token_triton`). Sums are in fp32; activations and ds c are rounded to x's dtype between two GEMMs,
so in fp16 a score must stay below 65504. CPU: `sparse_ffn_torch`, in fp32 (float64). A launch table can have plain
GEMMs run instead (`sparse_ffn_plain`), which round factors and scores to x's dtype too.

Autograd rounds dkeys and dvalues to the dtype of the rows; `sparse_ffn_backward` can give the sums as they are.

Limits: a token's picks are distinct (debug mode looks); K < 32768; T U, T K < 2^30 and U, d < 2^24.

Source: arXiv 2406.04984, section 3.1, algorithm 1; the router's factor as in the authors' repository.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..runtime import dispatch
from . import sparse_ffn_plain, sparse_ffn_torch, sparse_ffn_triton

__all__ = ["sparse_ffn", "sparse_ffn_backward"]

MAX_PICKS = 32767  # the int16 of the slots
_MAX_SIZE = 1 << 24
_MAX_PAIRS = 1 << 30

Grads = tuple[Tensor, Tensor, Tensor, Tensor]


def _check_values(position: Tensor, rows: int) -> None:
    inside = (position >= -1) & (position < rows)
    if not bool(inside.all()):
        dispatch.refuse("position", f"rows outside of -1 to {rows - 1}")
    ordered = position.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if bool(twice.any()):
        dispatch.refuse("position", "a token picks a row twice")


def _run(
    x: Tensor, keys: Tensor, values: Tensor, position: Tensor, factors: Tensor | None, base: Tensor | None,
    impl: str | None,
) -> Tensor:  # fmt: skip
    if dispatch.debug():
        _check_values(position, len(keys))
    if impl is None and sparse_ffn_plain.chosen(x):
        return sparse_ffn_plain.forward(x, keys, values, position, factors, base)
    if not dispatch.use_triton(impl, position.device, dispatch.half_or_single(x=x, factors=factors)):
        return sparse_ffn_torch.forward(x, keys, values, position, factors, base)
    if not (len(x) and len(keys) and position.shape[1]):
        return base.contiguous().clone() if base is not None else torch.zeros_like(x).contiguous()
    position, factors = dispatch.int32(position).contiguous(), factors.contiguous() if factors is not None else None
    base = dispatch.rows_apart(base) if base is not None else None
    return sparse_ffn_triton.forward(dispatch.rows_apart(x), keys, values, position, factors, base)


_op = torch.library.custom_op("adapter_kernels::sparse_ffn", mutates_args=())(_run)


@_op.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


def _run_backward(
    g: Tensor, x: Tensor, keys: Tensor, values: Tensor, position: Tensor, factors: Tensor | None, needs: list[bool],
    row_gradients: torch.dtype, impl: str | None,
) -> Grads:  # fmt: skip
    """Gradients of x, keys, values and factors; those that are not needed have no elements."""
    grads: tuple[Tensor | None, ...]
    if not (len(x) and len(keys) and position.shape[1]):
        dtypes = (x.dtype, row_gradients, row_gradients, None)
        inputs = zip((x, keys, values, factors), dtypes, strict=True)
        grads = tuple(None if t is None else t.new_zeros(t.shape, dtype=dtype) for t, dtype in inputs)
    elif impl is None and sparse_ffn_plain.chosen(x):
        grads = sparse_ffn_plain.backward(g, x, keys, values, position, factors, needs, row_gradients)
    elif dispatch.use_triton(impl, position.device, dispatch.half_or_single(x=x, factors=factors)):
        position, factors = dispatch.int32(position).contiguous(), factors.contiguous() if factors is not None else None
        g, x = dispatch.rows_apart(g), dispatch.rows_apart(x)
        grads = sparse_ffn_triton.backward(g, x, keys, values, position, factors, needs, row_gradients)
    else:
        grads = sparse_ffn_torch.backward(g, x, keys, values, position, factors, needs, row_gradients)
    none = x.new_empty(0)
    first, second, third, fourth = (
        grad if need and grad is not None else none.clone() for grad, need in zip(grads, needs, strict=True)
    )
    return first, second, third, fourth


_backward_op = torch.library.custom_op("adapter_kernels::sparse_ffn_backward", mutates_args=())(_run_backward)


@_backward_op.register_fake
def _(*arguments: Any) -> Grads:
    _, x, keys, values, _, factors, needs, row_gradients, _ = arguments
    dtypes = (x.dtype, row_gradients, row_gradients, None)
    first, second, third, fourth = (
        t.new_empty(t.shape, dtype=dtype) if need and t is not None else x.new_empty(0)
        for t, dtype, need in zip((x, keys, values, factors), dtypes, needs, strict=True)
    )
    return first, second, third, fourth


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _base, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, keys, values, position, factors = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4)]
    grads = _gradients(g, x, keys, values, position, factors, needs, keys.dtype, ctx.impl)
    return *grads[:3], None, grads[3], g if ctx.needs_input_grad[5] else None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def _gradients(
    g: Tensor, x: Tensor, keys: Tensor, values: Tensor, position: Tensor, factors: Tensor | None,
    needs: Sequence[bool], row_gradients: torch.dtype, impl: str | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """As the op's, None for those that are not needed."""
    wanted = [*needs[:3], needs[3] and factors is not None]
    if not any(wanted):
        return None, None, None, None
    run = _run_backward if dispatch.at_once(g, x, keys, values) else _backward_op
    made = run(g, x, keys, values, position, factors, wanted, row_gradients, impl)
    first, second, third, fourth = (grad if need else None for grad, need in zip(made, wanted, strict=True))
    return first, second, third, fourth


def sparse_ffn(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    factors: Tensor | None = None,
    *,
    base: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """base + the sum of ReLU(factor * (x . key)) * value over each token's picks; differentiable but for `position`.

    Args:
        x: [T, d], fp32, fp16 or bf16, rows at any distance; float64 on the torch path.
        keys, values: the compact rows, [U, d] of x's dtype, contiguous.
        position: int32 or int64 [T, K], each pick's compact row, as `row_union` gives it; -1 is none.
        factors: the router's logit of each pick's expert, [T, K], any float dtype; None: no factor.
        base: [T, d] of x's dtype, to which the sum is added in fp32; None: zeros.
        impl: "triton", "torch", or None: by the device of the positions.

    Returns:
        [T, d] of x's dtype.

    Raises:
        ValueError: wrong dtype, shape or device, rows that are not contiguous, sizes past a limit; in debug mode
            positions out of range or twice in a token.
    """
    _check(x, keys, values, position, factors)
    if base is not None:
        _check_tokens(base, "base", x)
    run = _run if dispatch.at_once(x, keys, values, factors, base) else _op
    return run(x, keys, values, position, factors, base, impl)


def sparse_ffn_backward(
    g: Tensor,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    factors: Tensor | None = None,
    *,
    needs: Sequence[bool] = (True, True, True, True),
    row_gradients: torch.dtype | None = None,
    impl: str | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of `sparse_ffn`, for an autograd function of the caller's: its own are rounded to the rows' dtype.

    Args:
        g: dL/dy, [T, d] of x's dtype, rows at any distance.
        x, keys, values, position, factors, impl: as in `sparse_ffn`.
        needs: which of the four are wanted.
        row_gradients: dtype of dkeys and dvalues: the rows', or float32, in which sums of half precision then leave
            without being rounded; None: the rows'.

    Returns:
        dx [T, d] of x's dtype, dkeys and dvalues [U, d], dfactors [T, K] of the factors' dtype; None for what is not
        wanted, and for dfactors without factors.

    Raises:
        ValueError: as `sparse_ffn`; another dtype of `row_gradients`, a narrower one too.
    """
    _check(x, keys, values, position, factors)
    _check_tokens(g, "g", x)
    known = dict.fromkeys((keys.dtype, torch.promote_types(keys.dtype, torch.float32)))
    if row_gradients is not None and row_gradients not in known:
        allowed = " or ".join(map(str, known))
        message = f"of rows of {keys.dtype} None or {allowed} is needed, not {row_gradients}"
        dispatch.refuse("row_gradients", message)
    return _gradients(g, x, keys, values, position, factors, needs, row_gradients or keys.dtype, impl)


def _check(x: Tensor, keys: Tensor, values: Tensor, position: Tensor, factors: Tensor | None) -> None:
    dispatch.require_matrix(x, "x", dispatch.FLOATS)
    (T, D), U = x.shape, keys.shape[0]
    for rows, name in ((keys, "keys"), (values, "values")):
        dispatch.require_matrix(rows, name, (x.dtype,), columns=D)
        if not rows.is_contiguous():
            dispatch.refuse(name, "contiguous rows are needed, as gather_rows makes them")
    if values.shape[0] != U:
        dispatch.refuse("values", f"{len(values)} rows, but {U} keys")
    if max(D, U) >= _MAX_SIZE:
        dispatch.refuse("keys", f"rows and columns must be less than {_MAX_SIZE}")
    dispatch.require_matrix(position, "position", dispatch.INTS)
    if position.shape[0] != T:
        dispatch.refuse("position", f"{len(position)} rows for {T} tokens")
    K = position.shape[1]
    if K > MAX_PICKS:
        dispatch.refuse("position", f"at most {MAX_PICKS} picks a token are possible, not {K}")
    if not (T * max(K, U) < _MAX_PAIRS):
        dispatch.refuse("x", f"{T} tokens are too many for 32-bit places; split them")
    if factors is not None:
        dispatch.require_matrix(factors, "factors", dispatch.FLOATS, columns=K)
        if factors.shape[0] != T:
            dispatch.refuse("factors", f"{len(factors)} rows for {T} tokens")
    dispatch.require_same_device(position=position, x=x, keys=keys, values=values, factors=factors)


def _check_tokens(tensor: Tensor, argument: str, x: Tensor) -> None:
    """As many tokens as x has, as wide, of its dtype and device."""
    dispatch.require_matrix(tensor, argument, (x.dtype,), columns=x.shape[1])
    if len(tensor) != len(x):
        dispatch.refuse(argument, f"{len(tensor)} rows for {len(x)} tokens")
    dispatch.require_same_device(x=x, **{argument: tensor})
