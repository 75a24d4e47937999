"""Per token the K largest positive scores among the neurons of its probed experts.

    s[t, j] = factors[t, e(j)] * (x[t] . keys[j])        for j in the P experts that token t probes, e(j) = j // (r / E)
    ids[t]  = the K largest positive s[t, j], in descending order; equal scores go to the lower neuron; then -1

Not differentiable: the forward of the sparse FFN computes the scores of the picked neurons again, with its gradient.
`dots` (x . w without the factor) are what the gradient of a factor needs: dp_e = sum over the picks of ds * dot.

Three kernels, and nothing of [T, r]: only [T, P, r/E] of dots in fp32, that is P/E of it.
1. `group`: one program an expert reads all T P expert ids, counts those of lower experts (where its own list begins)
   and then writes its own pairs t P + p in ascending order. No sort, no atomics, so always in the same order.
2. `dots`: a program takes a tile of one expert's pairs: a small GEMM of the gathered tokens with the expert's keys,
   accumulated in fp32. So each key is read about once and each token P times, from the L2 cache.
3. `pick`: one program a token. Positive floats order as their bits do, so a score, the reversed neuron and the place of
   its dot make one int64, and a bitonic top-k of those also breaks the ties.

An expert outside of 0 to E - 1 probes nothing: -1 marks the slots of padding tokens. The experts of a token must be
distinct. A score that is NaN is not positive. Limits of the kernels: x and keys of one dtype, no float64, P r/E <= 1024
candidates, K <= 256, r <= 2^20, E <= 1024. The torch path has none of them, and runs where they are passed.

In host memory a C++ library does the same (`host_topk`), where there was a compiler at installation.

Source: arXiv 2406.04984, section 3 and algorithm 1; the factor and the positivity from its authors' own runs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..runtime import dispatch
from . import expert_topk_kernels, host_topk, ordering
from .expert_topk_kernels import variants

__all__ = ["expert_topk", "variants"]


def _torch(
    x: Tensor, keys: Tensor, experts: Tensor, factors: Tensor | None, K: int, E: int, by_neuron: bool
) -> tuple[Tensor, Tensor, Tensor]:
    P, each = experts.shape[1], keys.shape[0] // E
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x = x.to(wide)
    # In ascending order, so that candidates stand in the order of their neurons, to the lower of which ties go.
    experts, slot = experts.where((experts >= 0) & (experts < E), E).sort(dim=1)
    dots = _probed_dots(x, keys, experts, E)
    scores = dots * factors.to(wide).gather(1, slot)[:, :, None] if factors is not None else dots
    scores = scores.nan_to_num(0.0, torch.inf, -torch.inf).relu_()
    neurons = (experts * each)[:, :, None] + torch.arange(each, dtype=experts.dtype, device=x.device)
    columns = [scores.flatten(1), dots.flatten(1), neurons.flatten(1)]
    n = min(K, P * each)
    if not by_neuron or n < P * each:
        candidate = ordering.largest(columns[0], n)
        candidate = candidate.sort(dim=1).values if by_neuron else candidate
        columns = [column.gather(1, candidate) for column in columns]
    scores, dots, neurons = columns
    used = scores > 0
    # x | (1 - 1) is x and x | (0 - 1) is -1: a tenth of what `where` takes.
    columns = [scores, dots.where(used, 0), (used.to(torch.int32) - 1).bitwise_or_(neurons.to(torch.int32))]
    if n < K:
        columns = [pad(column, (0, K - n), value=empty) for column, empty in zip(columns, (0, 0, -1), strict=True)]
    scores, dots, ids = columns
    return ids, scores, dots


def _probed_dots(x: Tensor, keys: Tensor, experts: Tensor, E: int) -> Tensor:
    """x . w of all neurons of the experts, ascending (E: of none), [T, P, r/E], in x's dtype.

    Tokens are grouped by expert, a small GEMM each; narrower keys are widened block by block, as in the kernel.
    """
    (T, P), each = experts.shape, keys.shape[0] // E
    if P == E and bool((experts < E).all()):
        return (x @ keys.to(x.dtype).T).view(T, P, each)
    if T == 1:  # in decoding, grouping would take as long as the products
        dots = x.new_zeros(1, P, each)
        for p, expert in enumerate(experts[0].tolist()):
            if expert < E:
                torch.mm(x, keys[expert * each : (expert + 1) * each].to(x.dtype).T, out=dots[:, p])
        return dots
    flat = experts.flatten().to(torch.int64)
    order = flat.argsort(stable=True)
    token = order // P
    grouped = x.new_zeros(T * P, each)
    start = 0
    for expert, count in enumerate(torch.bincount(flat, minlength=E)[:E].tolist()):
        if count:
            mine = slice(start, start + count)
            block = keys[expert * each : (expert + 1) * each].to(x.dtype)
            torch.mm(x.index_select(0, token[mine]), block.T, out=grouped[mine])
            start += count
    dots = torch.empty_like(grouped)
    dots[order] = grouped
    return dots.view(T, P, each)


@torch.library.custom_op("adapter_kernels::expert_topk", mutates_args=())
def _op(
    x: Tensor,
    keys: Tensor,
    experts: Tensor,
    factors: Tensor | None,
    K: int,
    E: int,
    by_neuron: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if dispatch.debug():
        dispatch.require(not bool(((experts < -1) | (experts >= E)).any()), "experts", f"ids outside of -1 to {E - 1}")
        ordered = experts.sort(dim=1).values
        twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        dispatch.require(not bool(twice.any()), "experts", "a token probes an expert twice")
        for tensor, name in ((x, "x"), (factors, "factors")):
            dispatch.require(tensor is None or not bool(tensor.isnan().any()), name, "NaN")
    if not dispatch.use_triton(impl, experts.device, expert_topk_kernels.unsupported(x, keys, experts.shape[1], K, E)):
        select = host_topk.expert_topk if impl is None and host_topk.serves(x, keys, experts, E) else _torch
        return select(x, keys, experts, factors, K, E, by_neuron)
    ids, scores, dots = expert_topk_kernels.select(x, keys, experts, factors, K, E)
    if by_neuron:
        ids, order = ids.sort(dim=1)
        scores, dots = scores.gather(1, order), dots.gather(1, order)
    return ids, scores, dots


@_op.register_fake
def _(
    x: Tensor,
    keys: Tensor,
    experts: Tensor,
    factors: Tensor | None,
    K: int,
    E: int,
    by_neuron: bool,
    impl: str | None,
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
    """Per token the K largest positive p_e * (x . w) among the neurons of its probed experts.

    Args:
        x: [T, d], fp32, fp16 or bf16, any strides; float64 on the torch path.
        keys: [r, d], contiguous, on x's device; expert e holds rows e r/E to (e + 1) r/E - 1. Of x's dtype; off the
            kernels also of a narrower one than x's fp32 or float64.
        experts: int32 or int64 [T, P], distinct within a token, in any order; -1 probes nothing.
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
    dispatch.require(keys.dtype == x.dtype or narrower, "keys", f"{keys.dtype}, but x is {x.dtype}")
    dispatch.require_matrix(experts, "experts", dispatch.INTS)
    dispatch.require(keys.is_contiguous(), "keys", "a contiguous table is needed; copying it here would cost its size")
    dispatch.require(E >= 1, "E", f"at least 1 is needed, not {E}")
    dispatch.require(keys.shape[0] % E == 0, "E", f"{E} does not divide the {keys.shape[0]} rows of keys")
    dispatch.require(keys.shape[0] > 0, "keys", "has no rows")
    dispatch.require(K >= 1, "K", f"at least 1 is needed, not {K}")
    dispatch.require(experts.shape[0] == x.shape[0], "experts", f"{experts.shape[0]} rows for {x.shape[0]} tokens")
    dispatch.require(1 <= experts.shape[1] <= E, "experts", f"1 to E = {E} columns are needed, not {experts.shape[1]}")
    if factors is not None:
        dispatch.require_matrix(factors, "factors", dispatch.FLOATS, columns=experts.shape[1])
        dispatch.require(factors.shape[0] == x.shape[0], "factors", f"{factors.shape[0]} rows for {x.shape[0]} tokens")
        factors = factors.detach()
    dispatch.require_same_device(experts=experts, x=x, keys=keys, factors=factors)
    return _op(x.detach(), keys.detach(), experts, factors, K, E, by_neuron, impl)
