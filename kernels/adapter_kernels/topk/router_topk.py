"""The P experts with the largest logits of each token, with their raw logits.

    experts[t] = the P largest of logits[t], in descending order; equal logits go to the lower expert
    picked[t, j] = logits[t, experts[t, j]]

Gradient: a pick copies, so dlogits[t, experts[t, j]] = dpicked[t, j] and all else is 0; `experts` has none.

NaN counts as larger than +inf, as in torch.sort, so that it shows in what is computed from `picked`; debug mode
(`dispatch.debugging`) raises. -0.0 equals 0.0. Every expert that comes out is one of 0 to E - 1, whatever goes in.

The kernel (`router_topk_triton`) has limits; the torch path (`router_topk_torch`) has none and runs where they are
passed. In host memory a C++ library does the same (`host_topk`), if there was a compiler at installation.

Source: arXiv 2406.04984, section 3; ties, which the paper leaves open, go to the lower expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..runtime import dispatch
from . import host_topk, router_topk_torch, router_topk_triton


def _run(logits: Tensor, P: int, impl: str | None) -> tuple[Tensor, Tensor]:
    if dispatch.debug():
        broken = logits.isnan().any(1).nonzero().flatten().tolist()
        if broken:
            dispatch.refuse("logits", f"NaN at {len(broken)} tokens, the first of them {broken[:1]}")
    if dispatch.use_triton(impl, logits.device, router_topk_triton.unsupported(logits, P)):
        return router_topk_triton.select(logits, P)
    experts = host_topk.router_topk(logits, P) if impl is None else None
    if experts is None:
        return router_topk_torch.select(logits, P)
    return logits.gather(1, experts.to(torch.int64)), experts


_op = torch.library.custom_op("adapter_kernels::router_topk", mutates_args=())(_run)


@_op.register_fake
def _(logits: Tensor, P: int, impl: str | None) -> tuple[Tensor, Tensor]:
    # The ids come second: opcheck adds up the outputs in the dtype of the first.
    shape = (logits.shape[0], P)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.num_experts = inputs[0].shape[1]


def _backward(ctx: Any, dpicked: Tensor, _: Tensor | None) -> tuple[Tensor, None, None]:
    (experts,) = ctx.saved_tensors
    dlogits = dpicked.new_zeros(dpicked.shape[0], ctx.num_experts)
    return dlogits.scatter(1, experts.to(torch.int64), dpicked), None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def router_topk(logits: Tensor, P: int, *, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """The P experts with the largest logits of each token, in descending order; ties go to the lower expert.

    Args:
        logits: [T, E], fp32, fp16 or bf16, any strides; float64 on the torch path.
        P: 1 to E.
        impl: "triton", "torch", or None: by the device of the logits and the limits of the kernel; in host memory the
            C++ library where it applies.

    Returns:
        experts, int32 [T, P], and their raw logits, [T, P] of the logits' dtype (differentiable).

    Raises:
        ValueError: wrong dtype or shape, P out of range, a limit of the kernel with impl="triton"; in debug mode NaN
            logits.
    """
    dispatch.require_matrix(logits, "logits", dispatch.FLOATS)
    E = logits.shape[1]
    if E < 1:
        dispatch.refuse("logits", "has no columns")
    if not (1 <= P <= E):
        dispatch.refuse("P", f"1 to {E} is needed, not {P}")
    picked, experts = (_run if dispatch.at_once(logits) else _op)(logits, P, impl)
    return experts, picked
