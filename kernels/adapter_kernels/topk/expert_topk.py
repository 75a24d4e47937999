"""Per token the K largest positive scores among the neurons of its experts.

    s[t, j] = factors[t, e(j)] * (x[t] . keys[j])        for j in the P experts of token t, e(j) = j // (r / E)
    ids[t]  = the K largest positive s[t, j], in descending order; equal scores go to the lower neuron; then -1

Not differentiable: the forward of the sparse FFN computes the scores of the picked neurons again, with its gradient.
`dots` (x . w without the factor) are what the gradient of a factor needs: dp_e = sum over the picks of ds * dot.

An expert outside of 0 to E - 1 is none: -1 marks the slots of padding tokens. The experts of a token must be distinct.
A score that is NaN is not positive.

The kernels (`expert_topk_triton`) have limits; the torch path (`expert_topk_torch`) has none and runs where they are
passed. In host memory a C++ library does the same (`host_topk`), if there was a compiler at installation.

Source: arXiv 2406.04984, section 3 and algorithm 1; the factor and the positivity from its authors' own runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime import dispatch
from . import expert_topk_torch, expert_topk_triton, host_topk

__all__ = ["expert_topk"]


def _run(
    x: Tensor, keys: Tensor, experts: Tensor, factors: Tensor | None, K: int, E: int, by_neuron: bool, impl: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    if dispatch.debug():
        if bool(((experts < -1) | (experts >= E)).any()):
            dispatch.refuse("experts", f"ids outside of -1 to {E - 1}")
        ordered = experts.sort(dim=1).values
        twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        if bool(twice.any()):
            dispatch.refuse("experts", "a token has an expert twice")
        for tensor, name in ((x, "x"), (factors, "factors")):
            if tensor is not None and bool(tensor.isnan().any()):
                dispatch.refuse(name, "NaN")
    if not dispatch.use_triton(impl, experts.device, expert_topk_triton.unsupported(x, keys, experts.shape[1], K, E)):
        on_host = impl is None and host_topk.handles(x, keys, experts.shape[1], E)
        select = host_topk.expert_topk if on_host else expert_topk_torch.select
        return select(x, keys, experts, factors, K, E, by_neuron)
    ids, scores, dots = expert_topk_triton.select(x, keys, experts, factors, K, E)
    if by_neuron:
        ids, order = ids.sort(dim=1)
        scores, dots = scores.gather(1, order), dots.gather(1, order)
    return ids, scores, dots


_op = torch.library.custom_op("adapter_kernels::expert_topk", mutates_args=())(_run)


@_op.register_fake
def _(
    x: Tensor, keys: Tensor, experts: Tensor, factors: Tensor | None, K: int, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (x.shape[0], K)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(shape, dtype=torch.int32), x.new_empty(shape, dtype=wide), x.new_empty(shape, dtype=wide)


def expert_topk(
    x: Tensor,
    keys: Tensor,
    experts: Tensor,
    factors: Tensor | None,
    K: int,
    *,
    E: int,
    by_neuron: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per token the K largest positive p_e * (x . w) among the neurons of its experts.

    Args:
        x: [T, d], fp32, fp16 or bf16, any strides; float64 on the torch path.
        keys: [r, d], contiguous, on x's device; expert e holds rows e r/E to (e + 1) r/E - 1. Of x's dtype; off the
            kernels also of a narrower one than x's fp32 or float64.
        experts: int32 or int64 [T, P], distinct within a token, in any order; -1 is none.
        factors: p_e of each of them, [T, P], any float dtype; None: no factor.
        K: picks a token, at least 1.
        E: number of experts, a divisor of r.
        by_neuron: picks in ascending order of neuron, among which any slot may be empty (-1).
        impl: "triton", "torch", or None: by the device of the ids and the limits of the kernels; in host memory the
            C++ library where it applies.

    Returns:
        ids: int32 [T, K], in descending order of score, -1 after the last positive one.
        scores, dots: [T, K], fp32 (float64 from float64), with and without the factor; 0 where there is no pick.

    Raises:
        ValueError: wrong dtype, shape or device, keys that are not contiguous, E that does not divide r, a limit of
            the kernels with impl="triton"; in debug mode ids out of range, an expert twice, NaN.
    """
    dispatch.require_matrix(x, "x", dispatch.FLOATS)
    dispatch.require_matrix(keys, "keys", dispatch.FLOATS, columns=x.shape[1])
    narrower = x.dtype.itemsize >= 4 and keys.dtype.itemsize < x.dtype.itemsize
    if keys.dtype != x.dtype and not narrower:
        dispatch.refuse("keys", f"{keys.dtype}, but x is {x.dtype}")
    dispatch.require_matrix(experts, "experts", dispatch.INTS)
    if not keys.is_contiguous():
        dispatch.refuse("keys", "a contiguous table is needed; copying it here would cost its size")
    if E < 1:
        dispatch.refuse("E", f"at least 1 is needed, not {E}")
    if keys.shape[0] % E != 0:
        dispatch.refuse("E", f"{E} does not divide the {keys.shape[0]} rows of keys")
    if not keys.shape[0]:
        dispatch.refuse("keys", "has no rows")
    if K < 1:
        dispatch.refuse("K", f"at least 1 is needed, not {K}")
    if experts.shape[0] != x.shape[0]:
        dispatch.refuse("experts", f"{experts.shape[0]} rows for {x.shape[0]} tokens")
    if not (1 <= experts.shape[1] <= E):
        dispatch.refuse("experts", f"1 to E = {E} columns are needed, not {experts.shape[1]}")
    if factors is not None:
        dispatch.require_matrix(factors, "factors", dispatch.FLOATS, columns=experts.shape[1])
        if factors.shape[0] != x.shape[0]:
            dispatch.refuse("factors", f"{factors.shape[0]} rows for {x.shape[0]} tokens")
        factors = factors.detach()
    dispatch.require_same_device(experts=experts, x=x, keys=keys, factors=factors)
    run = _run if dispatch.at_once(x) else _op
    return run(x.detach(), keys.detach(), experts, factors, K, E, by_neuron, impl)
