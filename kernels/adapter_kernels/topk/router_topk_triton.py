"""The kernel of `router_topk` and its launch: one warp a token.

A logit becomes an int32 of the same order, and that and the reversed expert one int64, so that ties break by
themselves. The maximum is taken and struck out P times. Limits: no float64, E <= 1024, P <= 32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..runtime import dispatch
from ..runtime import launch_config as launch
from ..runtime.specialisation import TYPE_NAMES, Specialisation, split, with_unaligned_rows
from ..runtime.triton_shim import kernel, tl, triton

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


def unsupported(logits: Tensor, P: int) -> Iterator[tuple[str, str]]:
    """What the kernel does not take: the argument, and why."""
    E = logits.shape[1]
    if logits.dtype not in dispatch.FLOATS:
        yield "logits", f"the Triton kernel has no {logits.dtype}"
    if E > MAX_EXPERTS:
        yield "logits", f"the Triton kernel takes 1 to {MAX_EXPERTS} experts (columns), not {E}"
    if P > MAX_PICKS:
        yield "P", f"the Triton kernel takes 1 to {MAX_PICKS}, not {P}"


def select(logits: Tensor, P: int) -> tuple[Tensor, Tensor]:
    """The picked logits and their experts, [T, P]."""
    logits = dispatch.rows_apart(logits)
    T, E = logits.shape
    experts = dispatch.empty((T, P), torch.int32, logits.device)
    picked = dispatch.empty((T, P), logits.dtype, logits.device)
    if T:
        with dispatch.device_guard(logits.device):
            _router_topk_kernel[(T,)](
                logits, experts, picked, E, P, logits.stride(0), BLOCK_E=_block(E), **_TABLE.on(logits.device)
            )
    return picked, experts


def variants(capability: int | None) -> list[Specialisation]:
    """What a launch can be: every dtype and block."""
    blocks, options = split(_TABLE.at(capability))
    types = {"experts_ptr": "*i32"} | dict.fromkeys(("E", "P", "stride_t"), "i32")
    found = []
    for name in TYPE_NAMES.values():
        typed = types | {"logits_ptr": f"*{name}", "picked_ptr": f"*{name}"}
        for block in sorted({_block(E) for E in range(1, MAX_EXPERTS + 1)}):
            constants = blocks | {"BLOCK_E": block}
            found.append(Specialisation(_router_topk_kernel, typed, constants, options, wide=True))
    return with_unaligned_rows(found)
