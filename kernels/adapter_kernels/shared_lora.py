"""Low-rank updates of projections that share their input and A, as q and v do: y_i = base_i + scaling h B_i^T.

    h = x A^T                             x [T, d], A [r, d]: read once for all projections
    y_i = base_i + scaling h B_i^T        B_i [out_i, r]: in a bank of several layers, this layer's row

Gradient, with g_i = dL/dy_i:

    dh = scaling sum_i g_i B_i            dx = dh A                       dbase_i = g_i
    dA = dh^T x                           dB_i = scaling g_i^T h

Kernels: `down` makes h, and backward dh, in pieces of the columns, since few tokens give few tiles; `up` adds the
pieces, always in the same order, multiplies them by B_i^T and adds the base, and backward by A, which is dx. Both are
bound by the bytes of x, base and y. dA and dB_i are products over all tokens, which cuBLAS makes as they are. Sums are
in fp32 (float64 of float64 on the torch path); h and dh are rounded to x's dtype before they are multiplied again.

Limits: one or two projections, all of one dtype; r <= 64 in the kernels; T d < 2^31.

Source: ASLoRA, equation 2: A shared by all layers, B by groups of layers; the update of one layer is LoRA's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .runtime import dispatch
from .runtime import launch_config as launch
from .runtime.specialisation import KINDS_OF_ROWS, Variant, odd, split
from .runtime.triton_shim import kernel, tl, triton

MAX_RANK = 64

# Derived, not measured. T 512 makes 32 programs of 16 tokens; 4 pieces of the columns make them 128, about one a
# multiprocessor. At rank 64 two copies of (16 + 64) 128 values are 40 KiB: two blocks in the 100 KiB of sm_86/89.
_DOWN = launch.Table("shared_lora.down", {"BM": 16, "BK": 128, "PIECES": 4, "num_warps": 4, "num_stages": 3})
# Derived, not measured: rows that are no multiples of 16 values are read value by value, each at an address of its own:
# a short BK avoids spills, and what is read so is not staged.
_DOWN_ODD = launch.Table("shared_lora.down_odd", {"BM": 16, "BK": 64, "PIECES": 4, "num_warps": 4, "num_stages": 2})
# Derived, not measured: fp32 products run on the ordinary cores ("ieee"), which keep operands in registers.
_DOWN_FP32 = launch.Table("shared_lora.down_fp32", {"BM": 16, "BK": 32, "PIECES": 4, "num_warps": 4, "num_stages": 2})
# Derived, not measured: bound by reading base and writing y, 8 KiB of each a tile; no loop, so nothing to stage.
_UP = launch.Table("shared_lora.up", {"BM": 32, "BN": 128, "num_warps": 4, "num_stages": 1})
# Derived, not measured: addresses of single values need registers; four warps spill on sm_90 with triton 3.6.
_UP_ODD = launch.Table("shared_lora.up_odd", {"BM": 32, "BN": 128, "num_warps": 8, "num_stages": 1})
_UP_FP32 = launch.Table("shared_lora.up_fp32", {"BM": 32, "BN": 64, "num_warps": 8, "num_stages": 1})


@kernel("D", "stride_x")
def _down_kernel(
    x_ptr, w_ptr, h_ptr, T, D, R, stride_x,
    BY_RANK: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Programs (tokens, piece): h[piece] [T, R] = the piece's columns of x times w, [R, D] if BY_RANK, else [D, R]."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    r = tl.arange(0, BR)
    total = tl.zeros((BM, BR), tl.float32)
    for done in range(tl.program_id(1) * BK, D, tl.num_programs(1) * BK):
        k = done + tl.arange(0, BK)
        x = x_ptr + m.to(tl.int64)[:, None] * stride_x + k[None, :]
        x = tl.load(x, mask=(m < T)[:, None] & (k < D)[None, :], other=0.0)
        w = w_ptr + (r[None, :] * D + k[:, None] if BY_RANK else k[:, None] * R + r[None, :])
        w = tl.load(w, mask=(k < D)[:, None] & (r < R)[None, :], other=0.0)
        total = tl.dot(x, w, total, input_precision=PRECISION)
    h = h_ptr + (tl.program_id(1).to(tl.int64) * T + m)[:, None] * R + r[None, :]
    tl.store(h, total, mask=(m < T)[:, None] & (r < R)[None, :])


@kernel("N", "stride_base")
def _up_kernel(
    h_ptr, w_ptr, base_ptr, y_ptr, T, N, R, pieces, stride_base, scaling,
    BY_RANK: tl.constexpr, BASE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y = base + scaling (the sum of the pieces of h) w, where w is [R, N] if BY_RANK, else stored as [N, R]."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    r = tl.arange(0, BR)
    h = tl.zeros((BM, BR), tl.float32)
    for piece in range(pieces):
        at = h_ptr + (m.to(tl.int64) + piece * T)[:, None] * R + r[None, :]
        h += tl.load(at, mask=(m < T)[:, None] & (r < R)[None, :], other=0.0)
    w = w_ptr + (r[:, None] * N + n[None, :] if BY_RANK else n[None, :] * R + r[:, None])
    w = tl.load(w, mask=(r < R)[:, None] & (n < N)[None, :], other=0.0)
    y = tl.dot(h.to(w.dtype), w, input_precision=PRECISION) * scaling
    inside = (m < T)[:, None] & (n < N)[None, :]
    if BASE:
        base = base_ptr + m.to(tl.int64)[:, None] * stride_base + n[None, :]
        y += tl.load(base, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + m.to(tl.int64)[:, None] * N + n[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


def _rank_block(R: int) -> int:
    # Two sizes, so that few kernels are compiled.
    return 16 if R <= 16 else MAX_RANK


def _down_table(dtype: torch.dtype, odd_rows: bool) -> launch.Table:
    if dtype == torch.float32:
        return _DOWN_FP32
    return _DOWN_ODD if odd_rows else _DOWN


def _down(pairs: list[tuple[Tensor, Tensor]], R: int, by_rank: bool) -> Tensor:
    """Pieces of the sum of x w over the pairs, fp32 [pieces, T, R]."""
    first = pairs[0][0]
    config = _down_table(first.dtype, any(odd(x.shape[1], x.stride(0)) for x, _ in pairs)).on(first.device)
    pieces = config.pop("PIECES")
    h = dispatch.empty((len(pairs) * pieces, len(first), R), torch.float32, first.device)
    for i, (x, w) in enumerate(pairs):
        _down_kernel[(triton.cdiv(len(x), config["BM"]), pieces)](
            x, w, h[i * pieces :], *x.shape, R, x.stride(0),
            BY_RANK=by_rank, PRECISION="ieee", BR=_rank_block(R), **config,
        )  # fmt: skip
    return h


def _up_table(dtype: torch.dtype, odd_rows: bool) -> launch.Table:
    return _UP_FP32 if dtype == torch.float32 else _UP_ODD if odd_rows else _UP


def _up(h: Tensor, w: Tensor, base: Tensor | None, dtype: torch.dtype, scaling: float, by_rank: bool) -> Tensor:
    pieces, T, R = h.shape
    N = w.shape[1] if by_rank else w.shape[0]
    y = dispatch.empty((T, N), dtype, h.device)
    config = _up_table(dtype, odd(N, base.stride(0) if base is not None else 0)).on(h.device)
    _up_kernel[(triton.cdiv(T, config["BM"]), triton.cdiv(N, config["BN"]))](
        h, w, base, y, T, N, R, pieces, base.stride(0) if base is not None else 0, scaling,
        BY_RANK=by_rank, BASE=base is not None, PRECISION="ieee", BR=_rank_block(R), **config,
    )  # fmt: skip
    return y


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def _refusals(x: Tensor, A: Tensor) -> list[tuple[str, str]]:
    """What the kernels do not take: the argument, and why."""
    too_large = [("A", f"rank {len(A)} is more than {MAX_RANK}")] if len(A) > MAX_RANK else []
    return dispatch.half_or_single(x=x) + too_large


def _projections(x: Tensor, *pairs: tuple[Tensor | None, Tensor | None]) -> list[tuple[Tensor, Tensor]]:
    """Those that are there: the second may be absent."""
    return [(a, b) for a, b in pairs if a is not None and b is not None]


@torch.library.custom_op("adapter_kernels::shared_lora", mutates_args=())
def _op(
    x: Tensor,
    A: Tensor,
    base: Tensor,
    B: Tensor,
    base2: Tensor | None,
    B2: Tensor | None,
    scaling: float,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, y2 (of no columns where there is no second projection) and h, in the dtype of sums."""
    found = _projections(x, (base, B), (base2, B2))
    triton_runs = dispatch.use_triton(impl, x.device, _refusals(x, A))
    ys = []
    if not (len(x) and len(A) and triton_runs):
        h = _wide(x) @ _wide(A).T
        ys = [torch.addmm(_wide(b), h, _wide(w).T, alpha=scaling).to(x.dtype) for b, w in found]
    else:
        with dispatch.on(x.device):
            pieces = _down([(dispatch.rows_apart(x), A.contiguous())], len(A), True)
            h = pieces.sum(0)
            for b, w in found:
                ys.append(_up(pieces, w.contiguous(), dispatch.rows_apart(b), x.dtype, scaling, False))
    return ys[0], ys[1] if len(ys) > 1 else x.new_empty(len(x), 0), h


@_op.register_fake
def _(
    x: Tensor,
    A: Tensor,
    base: Tensor,
    B: Tensor,
    base2: Tensor | None,
    B2: Tensor | None,
    scaling: float,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    T, wide = x.shape[0], torch.float64 if x.dtype == torch.float64 else torch.float32
    columns = B2.shape[0] if B2 is not None else 0
    return x.new_empty(T, B.shape[0]), x.new_empty(T, columns), x.new_empty(T, A.shape[0], dtype=wide)


@torch.library.custom_op("adapter_kernels::shared_lora_backward", mutates_args=())
def _backward_op(
    x: Tensor,
    A: Tensor,
    h: Tensor,
    g: Tensor,
    B: Tensor,
    g2: Tensor | None,
    B2: Tensor | None,
    scaling: float,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dA, dB and dB2 (of no rows where there is no second projection)."""
    found = _projections(x, (g, B), (g2, B2))
    if not (len(x) and len(A) and dispatch.use_triton(impl, x.device, _refusals(x, A))):
        dh = torch.stack([_wide(grad) @ _wide(w) for grad, w in found]).sum(0) * scaling
        dx, dA = (dh @ _wide(A)).to(x.dtype), (dh.T @ _wide(x)).to(A.dtype)
        dBs = [(_wide(grad).T @ h * scaling).to(w.dtype) for grad, w in found]
    else:
        with dispatch.on(x.device):
            pieces = _down([(dispatch.rows_apart(grad), w.contiguous()) for grad, w in found], len(A), False)
            dx = _up(pieces, A.contiguous(), None, x.dtype, scaling, True)
            dA = (pieces.sum(0) * scaling).to(x.dtype).T @ x
            narrow = (h * scaling).to(x.dtype)
            dBs = [grad.T @ narrow for grad, _ in found]
    return dx, dA, dBs[0], dBs[1] if len(dBs) > 1 else x.new_empty(0, len(A))


@_backward_op.register_fake
def _(
    x: Tensor,
    A: Tensor,
    h: Tensor,
    g: Tensor,
    B: Tensor,
    g2: Tensor | None,
    B2: Tensor | None,
    scaling: float,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = B2.shape[0] if B2 is not None else 0
    return x.new_empty(x.shape), A.new_empty(A.shape), B.new_empty(B.shape), x.new_empty(rows, A.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, A, _, B, _, B2, ctx.scaling, ctx.impl = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(x, A, B, B2, output[2])


def _backward(ctx: Any, g: Tensor, g2: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, A, B, B2, h = ctx.saved_tensors
    second = g2 if B2 is not None else None
    dx, dA, dB, dB2 = _backward_op(x, A, h, g, B, second, B2, ctx.scaling, ctx.impl)
    return dx, dA, g, dB, second, dB2 if B2 is not None else None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def shared_lora(
    x: Tensor, A: Tensor, projections: list[tuple[Tensor, Tensor]], scaling: float, *, impl: str | None = None
) -> list[Tensor]:
    """base + scaling * (x A^T) B^T for one or two projections; differentiable in all tensors.

    Args:
        x: [T, d], fp32, fp16 or bf16, any strides; float64 on the torch path.
        A: [r, d] of x's dtype.
        projections: for each the base layer's output [T, out] and B [out, r], of x's dtype.
        scaling: lora_alpha / r, or whatever the method takes.
        impl: "triton", "torch", or None: by the device of x.

    Returns:
        [T, out] for each projection.

    Raises:
        ValueError: wrong dtype, shape or device; in the kernels a rank past the limit.
    """
    dispatch.require_matrix(x, "x", dispatch.FLOATS)
    dispatch.require_matrix(A, "A", (x.dtype,), columns=x.shape[1])
    dispatch.require(1 <= len(projections) <= 2, "projections", f"one or two are needed, not {len(projections)}")
    dispatch.require(x.numel() < 1 << 31, "x", "more than 2^31 values; split the tokens")
    for i, (base, B) in enumerate(projections):
        dispatch.require_matrix(B, f"projections[{i}][1]", (x.dtype,), columns=len(A))
        dispatch.require_matrix(base, f"projections[{i}][0]", (x.dtype,), columns=len(B))
        dispatch.require(len(base) == len(x), f"projections[{i}][0]", f"{len(base)} rows for {len(x)} tokens")
        dispatch.require_same_device(x=x, A=A, **{f"projections[{i}][0]": base, f"projections[{i}][1]": B})
    base2, B2 = projections[1] if len(projections) > 1 else (None, None)
    y, y2, _ = _op(x, A, *projections[0], base2, B2, scaling, impl)
    return [y, y2] if B2 is not None else [y]


def variants(capability: int | None) -> list[Variant]:
    """What a launch can be: forward and backward, every dtype and block of ranks."""
    found = []
    for dtype, name, odd_rows in KINDS_OF_ROWS:
        rows = {"aligned": not odd_rows, "wide": not odd_rows}
        for block in (16, MAX_RANK):
            for backward in (False, True):
                blocks, options = split(_down_table(dtype, odd_rows).at(capability))
                del blocks["PIECES"]
                types = {"x_ptr": f"*{name}", "w_ptr": f"*{name}", "h_ptr": "*fp32"}
                types |= dict.fromkeys(("T", "D", "R", "stride_x"), "i32")
                constants = blocks | {"BY_RANK": not backward, "PRECISION": "ieee", "BR": block}
                found.append(Variant(_down_kernel, types, constants, options, **rows))
                blocks, options = split(_up_table(dtype, odd_rows).at(capability))
                types = {"h_ptr": "*fp32", "w_ptr": f"*{name}", "y_ptr": f"*{name}", "scaling": "fp32"}
                types |= dict.fromkeys(("T", "N", "R", "pieces", "stride_base"), "i32")
                types |= {} if backward else {"base_ptr": f"*{name}"}
                constants = blocks | ({"base_ptr": None} if backward else {})
                constants |= {"BY_RANK": backward, "BASE": not backward, "PRECISION": "ieee", "BR": block}
                found.append(Variant(_up_kernel, types, constants, options, **rows))
    return found
