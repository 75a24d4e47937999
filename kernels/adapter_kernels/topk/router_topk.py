"""The P experts with the largest logits of each token, with their raw logits.

    experts[t] = the P largest of logits[t], in descending order; equal logits go to the lower expert
    picked[t, j] = logits[t, experts[t, j]]

Gradient: a pick copies, so dlogits[t, experts[t, j]] = dpicked[t, j] and all else is 0; `experts` has none.

NaN counts as larger than +inf, as in torch.sort, so that it shows in what is computed from `picked`; debug mode
(`dispatch.debugging`) raises. -0.0 equals 0.0. Every expert that comes out is one of 0 to E - 1, whatever goes in.

The kernel: one warp a token. A logit becomes an int32 of the same order, that and the reversed expert one int64, so
that ties break by themselves; then P times the maximum is taken and struck out. Limits of the kernel: no float64,
E <= 1024, P <= 32. The torch path has none of them, and runs where they are passed.

Source: arXiv 2406.04984, section 3; ties, which the paper leaves open, go to the lower expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..runtime import dispatch
from ..runtime import launch_config as launch
from ..runtime.specialisation import TYPE_NAMES, Specialisation, split, with_odd_rows
from ..runtime.triton_shim import kernel, tl, triton
from . import host_topk, ordering

MAX_EXPERTS = 1024
MAX_PICKS = 32

# Derived, not measured: a warp holds 1024 int64 in 64 registers a lane and then needs no barrier between the P rounds,
# which are a chain of dependent reductions; with T programs of one warp the device hides their latency.
_TABLE = launch.Table("router_topk", {"num_warps": 1, "num_stages": 1})


@kernel("E", "stride_t")
def _router_topk_kernel(logits_ptr, experts_ptr, picked_ptr, E, P, stride_t, BLOCK_E: tl.constexpr):
    """One program a token."""
    t = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    value = tl.load(logits_ptr + t * stride_t + e, mask=e < E, other=0.0).to(tl.float32)
    value = tl.where(value == 0.0, 0.0, value)
    bits = value.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    order = tl.where(value != value, 0x7FFFFFFF, order)
    # Below every float's: neither the padding nor an expert that was taken comes up before P real ones have.
    packed = tl.where(e < E, order.to(tl.int64), -2147483648) * BLOCK_E + (BLOCK_E - 1 - e)
    for j in range(P):
        best = tl.max(packed, 0)
        expert = BLOCK_E - 1 - (best & (BLOCK_E - 1)).to(tl.int32)
        packed = tl.where(e == expert, -2147483648 * BLOCK_E, packed)
        tl.store(experts_ptr + t * P + j, expert)
        # Read again rather than decoded: the raw logit, in its own dtype and with its own sign of zero.
        tl.store(picked_ptr + t * P + j, tl.load(logits_ptr + t * stride_t + expert))


def _block(E: int) -> int:
    # Few sizes, so that few kernels are compiled: 256 and 320, 368 are the experts of the published models.
    return max(256, triton.next_power_of_2(E))


def _refusals(logits: Tensor, P: int) -> Iterator[tuple[str, str]]:
    """What the kernel does not take: the argument, and why."""
    E = logits.shape[1]
    if logits.dtype not in dispatch.FLOATS:
        yield "logits", f"the Triton kernel has no {logits.dtype}"
    if E > MAX_EXPERTS:
        yield "logits", f"the Triton kernel takes 1 to {MAX_EXPERTS} experts (columns), not {E}"
    if P > MAX_PICKS:
        yield "P", f"the Triton kernel takes 1 to {MAX_PICKS}, not {P}"


def _triton(logits: Tensor, P: int) -> tuple[Tensor, Tensor]:
    logits = dispatch.rows_apart(logits)
    T, E = logits.shape
    experts = dispatch.empty((T, P), torch.int32, logits.device)
    picked = dispatch.empty((T, P), logits.dtype, logits.device)
    if T:
        with dispatch.on(logits.device):
            _router_topk_kernel[(T,)](
                logits, experts, picked, E, P, logits.stride(0), BLOCK_E=_block(E), **_TABLE.on(logits.device)
            )
    return picked, experts


def _torch(logits: Tensor, P: int) -> tuple[Tensor, Tensor]:
    experts = ordering.largest(logits, P)
    return logits.gather(1, experts), experts.to(torch.int32)


@torch.library.custom_op("adapter_kernels::router_topk", mutates_args=())
def _op(logits: Tensor, P: int, impl: str | None) -> tuple[Tensor, Tensor]:
    if dispatch.debug():
        broken = logits.isnan().any(1).nonzero().flatten().tolist()
        dispatch.require(not broken, "logits", f"NaN at {len(broken)} tokens, the first of them {broken[:1]}")
    if dispatch.use_triton(impl, logits.device, _refusals(logits, P)):
        return _triton(logits, P)
    experts = host_topk.router_topk(logits, P) if impl is None else None
    return _torch(logits, P) if experts is None else (logits.gather(1, experts.to(torch.int64)), experts)


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
    dispatch.require(E >= 1, "logits", "has no columns")
    dispatch.require(1 <= P <= E, "P", f"1 to {E} is needed, not {P}")
    picked, experts = _op(logits, P, impl)
    return experts, picked


def variants(capability: int | None) -> list[Specialisation]:
    """What a launch can be: every dtype and block."""
    blocks, options = split(_TABLE.at(capability))
    return with_odd_rows(
        [
            Specialisation(
                _router_topk_kernel,
                {
                    "logits_ptr": f"*{name}",
                    "experts_ptr": "*i32",
                    "picked_ptr": f"*{name}",
                    "E": "i32",
                    "P": "i32",
                    "stride_t": "i32",
                },
                blocks | {"BLOCK_E": block},
                options,
                wide=True,
            )
            for name in TYPE_NAMES.values()
            for block in sorted({_block(E) for E in range(1, MAX_EXPERTS + 1)})
        ]
    )
