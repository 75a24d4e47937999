"""The kernels of `sparse_ffn` for many tokens, the masked form, and their launches.

Two GEMMs forward and five backward over all pairs of a token and a compact row, on tensor cores. What is between them
is [T, U]: `slots` (int16: which of the token's picks the row is, or -1; mask and way to the pick's factor in one), the
activations and, backward, the key-side factors. Their rows are padded to 64 values, of which the last are zeros, so
that they too can be read 16 bytes at a time.

Rows whose length is no multiple of 16 are copied into longer rows that end in zeros: reading tiles of single values, at
an address each, would take several times as long, and the registers of two more tables.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime import dispatch
from ..runtime import launch_config as launch
from ..runtime.specialisation import TYPE_NAMES, Specialisation, split, unaligned, with_unaligned_rows
from ..runtime.triton_shim import kernel, tl, triton
from . import sparse_ffn_token_triton

_SLOTS = launch.Table("sparse_ffn.slots", {"BLOCK": 128, "num_warps": 1, "num_stages": 1})
# Derived, not measured. 64 tokens a tile, since T 512 and 1,600 rows then make 104 programs (128 would make 52 on 82 to
# 132 multiprocessors). 3 stages hold two copies of (64 + 128) 64 values, 48 KiB, so that two blocks share the 100 KiB
# of a multiprocessor of sm_86/89; sm_90 has 227.
_FORWARD = launch.Table(
    "sparse_ffn.forward", {"BM": 64, "BN": 128, "BK": 64, "num_warps": 4, "num_stages": 3}, {90: {"num_stages": 4}}
)
# Derived, not measured: four tiles a stage and two sums, so half the width, 32 KiB (on sm_90 128) and, where operands
# lie in registers, 8 warps: 4 spill.
_BACKWARD = launch.Table(
    "sparse_ffn.backward",
    {"BM": 64, "BN": 64, "BK": 64, "num_warps": 8, "num_stages": 2},
    {90: {"num_warps": 4, "num_stages": 4}},
)
# Derived, not measured: as forward, with half of BK: the addresses of two operands of 64 spill a little on sm_86. 5
# stages hold four copies of (64 + 128) 32 values, 48 KiB.
_PRODUCT = launch.Table(
    "sparse_ffn.product",
    {"BM": 64, "BN": 128, "BK": 32, "num_warps": 4, "num_stages": 5},
    {90: {"BK": 64, "num_stages": 4}},
)
# Derived, not measured: fp32 products run on the ordinary cores ("ieee"), which keep operands in registers: 8 warps and
# a short BK avoid spills.
_FP32 = {"BM": 64, "BN": 64, "BK": 16, "num_warps": 8, "num_stages": 2}
_FORWARD_FP32 = launch.Table("sparse_ffn.forward_fp32", _FP32)
_BACKWARD_FP32 = launch.Table("sparse_ffn.backward_fp32", _FP32 | {"BN": 32})
_PRODUCT_FP32 = launch.Table("sparse_ffn.product_fp32", _FP32)


@kernel("K", "width")
def _slots_kernel(position_ptr, slots_ptr, U, K, width, BLOCK: tl.constexpr):
    """One program a token; slots are -1 before."""
    t = tl.program_id(0).to(tl.int64)
    for first in range(0, K, BLOCK):
        j = first + tl.arange(0, BLOCK)
        row = tl.load(position_ptr + t * K + j, mask=j < K, other=-1)
        tl.store(slots_ptr + t * width + row, j.to(tl.int16), mask=(row >= 0) & (row < U))


@kernel("D", "width", "stride_x", "stride_g")
def _scores_kernel(
    x_ptr, keys_ptr, g_ptr, values_ptr, slots_ptr, factors_ptr, active_ptr, bykey_ptr, dfactors_ptr,
    T, U, D, K, width, stride_x, stride_g,
    FACTOR: tl.constexpr, BACKWARD: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of x keys^T, masked; backward g values^T beside it, so that the scores need not be kept."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    x = x_ptr + m.to(tl.int64)[:, None] * stride_x + k[None, :]
    key = keys_ptr + n.to(tl.int64)[None, :] * D + k[:, None]
    dot = tl.zeros((BM, BN), tl.float32)
    if BACKWARD:
        g = g_ptr + m.to(tl.int64)[:, None] * stride_g + k[None, :]
        value = values_ptr + n.to(tl.int64)[None, :] * D + k[:, None]
        ds = tl.zeros((BM, BN), tl.float32)
    for done in range(0, D, BK):
        token_mask = (m < T)[:, None] & (k < D - done)[None, :]
        row_mask = (n < U)[None, :] & (k < D - done)[:, None]
        a = tl.load(x + done, mask=token_mask, other=0.0)
        b = tl.load(key + done, mask=row_mask, other=0.0)
        dot = tl.dot(a, b, dot, input_precision=PRECISION)
        if BACKWARD:
            a = tl.load(g + done, mask=token_mask, other=0.0)
            b = tl.load(value + done, mask=row_mask, other=0.0)
            ds = tl.dot(a, b, ds, input_precision=PRECISION)
    at = m.to(tl.int64)[:, None] * width + n[None, :]
    inside = (m < T)[:, None] & (n < width)[None, :]
    slot = tl.load(slots_ptr + at, mask=inside, other=-1).to(tl.int32)
    pick = m[:, None] * K + slot  # int32: one a value of the tile, and 64 bits of each would spill
    score = dot
    if FACTOR:
        factor = tl.load(factors_ptr + pick, mask=slot >= 0, other=0.0).to(tl.float32)
        score = dot * factor
    positive = (slot >= 0) & (score > 0)
    active = tl.where(positive, score, 0.0)
    tl.store(active_ptr + at, active.to(active_ptr.dtype.element_ty), mask=inside)
    if BACKWARD:
        ds = tl.where(positive, ds, 0.0)
        if FACTOR:
            tl.store(dfactors_ptr + pick, (ds * dot).to(dfactors_ptr.dtype.element_ty), mask=slot >= 0)
            ds = ds * factor
        tl.store(bykey_ptr + at, ds.to(bykey_ptr.dtype.element_ty), mask=inside)


@kernel("N", "width", "stride_base")
def _product_kernel(
    a_ptr, b_ptr, base_ptr, out_ptr, M, N, K, width, stride_base,
    TRANSPOSED: tl.constexpr, BASE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [M, N] = base + a b, with a [M, K] (or its transpose) in rows of `width` that end in zeros; b is [K, N]."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for done in range(0, K, BK):
        k = done + tl.arange(0, BK)
        # Along the rows of a the bound is `width`, a multiple of 64, and not the number of compact rows, which is odd.
        if TRANSPOSED:
            left = a_ptr + k.to(tl.int64)[None, :] * width + m[:, None]
            a = tl.load(left, mask=(m < width)[:, None] & (k < K)[None, :], other=0.0)
        else:
            left = a_ptr + m.to(tl.int64)[:, None] * width + k[None, :]
            a = tl.load(left, mask=(m < M)[:, None] & (k < width)[None, :], other=0.0)
        right = b_ptr + k.to(tl.int64)[:, None] * N + n[None, :]
        b = tl.load(right, mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    inside = (m < M)[:, None] & (n < N)[None, :]
    if BASE:
        base = base_ptr + m.to(tl.int64)[:, None] * stride_base + n[None, :]
        total += tl.load(base, mask=inside, other=0.0).to(tl.float32)
    out = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)


def _tables(dtype: torch.dtype) -> tuple[launch.Table, launch.Table, launch.Table]:
    """For the forward scores, the backward scores and the products."""
    single = dtype == torch.float32
    return (_FORWARD_FP32, _BACKWARD_FP32, _PRODUCT_FP32) if single else (_FORWARD, _BACKWARD, _PRODUCT)


def _aligned_rows(tensor: Tensor) -> Tensor:
    """The tensor itself where its rows are multiples of 16 values long and apart, or else a copy that ends in zeros."""
    rows, D = tensor.shape
    if not unaligned(D, tensor.stride(0)):
        return tensor
    copy = dispatch.empty((rows, triton.cdiv(D, 16) * 16), tensor.dtype, tensor.device)
    copy[:, :D] = tensor
    copy[:, D:] = 0
    return copy


def _make_slots(position: Tensor, U: int) -> Tensor:
    T, K = position.shape
    slots = dispatch.empty((T, triton.cdiv(U, 64) * 64), torch.int16, position.device).fill_(-1)
    _slots_kernel[(T,)](position, slots, U, K, slots.shape[1], **_SLOTS.on(position.device))
    return slots


def _product(
    a: Tensor, b: Tensor, rows: int, dtype: torch.dtype, *, transposed: bool = False, base: Tensor | None = None
) -> Tensor:
    """`rows` rows of a b, or of a^T b."""
    out = dispatch.empty((rows, b.shape[1]), dtype, b.device)
    config = _tables(b.dtype)[2].on(b.device)
    _product_kernel[(triton.cdiv(rows, config["BM"]), triton.cdiv(b.shape[1], config["BN"]))](
        a, b, base, out, rows, b.shape[1], b.shape[0], a.shape[1], base.stride(0) if base is not None else 0,
        TRANSPOSED=transposed, BASE=base is not None, PRECISION="ieee", **config,
    )  # fmt: skip
    return out


def forward(
    x: Tensor, keys: Tensor, values: Tensor, position: Tensor, factors: Tensor | None, base: Tensor | None
) -> Tensor:
    """y, at least one token and one row given; rows of x and base in one piece each, all else contiguous."""
    if len(x) <= sparse_ffn_token_triton.MAX_TOKENS:
        return sparse_ffn_token_triton.forward(x, keys, values, position, factors, base)
    (T, D), (U, K) = x.shape, (len(keys), position.shape[1])
    with dispatch.device_guard(x.device):
        slots = _make_slots(position, U)
        active = dispatch.empty(slots.shape, x.dtype, x.device)
        x, keys, values = map(_aligned_rows, (x, keys, values))
        base = _aligned_rows(base) if base is not None else None
        _scores(x, keys, None, None, slots, factors, active, None, None, K)
        return _product(active, values, T, x.dtype, base=base)[:, :D].contiguous()


def _scores(
    x: Tensor, keys: Tensor, g: Tensor | None, values: Tensor | None, slots: Tensor, factors: Tensor | None,
    active: Tensor, bykey: Tensor | None, dfactors: Tensor | None, K: int,
) -> None:  # fmt: skip
    (T, D), width = x.shape, slots.shape[1]
    config = _tables(x.dtype)[g is not None].on(x.device)
    _scores_kernel[(triton.cdiv(T, config["BM"]), triton.cdiv(width, config["BN"]))](
        x, keys, g, values, slots, factors, active, bykey, dfactors,
        T, len(keys), D, K, width, x.stride(0), g.stride(0) if g is not None else 0,
        FACTOR=factors is not None, BACKWARD=g is not None, PRECISION="ieee", **config,
    )  # fmt: skip


def backward(
    g: Tensor, x: Tensor, keys: Tensor, values: Tensor, position: Tensor, factors: Tensor | None, needs: list[bool],
    row_gradients: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx, dkeys, dvalues and dfactors, of which only those that are needed are sure to be made.

    Args:
        row_gradients: dtype of dkeys and dvalues.
    """
    D = x.shape[1]
    with dispatch.device_guard(x.device):
        g, x, keys, values = map(_aligned_rows, (g, x, keys, values))
        slots = _make_slots(position, len(keys))
        active = dispatch.empty(slots.shape, x.dtype, x.device)
        bykey = dispatch.empty(slots.shape, x.dtype, x.device)
        dfactors = None
        if factors is not None:
            dfactors = dispatch.empty(factors.shape, factors.dtype, x.device).zero_()  # where a pick is none
        _scores(x, keys, g, values, slots, factors, active, bykey, dfactors, position.shape[1])
        dx = _product(bykey, keys, len(x), x.dtype) if needs[0] else None
        dkeys = _product(bykey, x.contiguous(), len(keys), row_gradients, transposed=True) if needs[1] else None
        dvalues = _product(active, g.contiguous(), len(keys), row_gradients, transposed=True) if needs[2] else None
        dx, dkeys, dvalues = (t[:, :D].contiguous() if t is not None else None for t in (dx, dkeys, dvalues))
        return dx, dkeys, dvalues, dfactors


def variants(capability: int | None) -> list[Specialisation]:
    """What a launch can be: both forms, both directions, every dtype; factors in the dtype of x or in fp32.

    The products read rows of multiples of 16 values alone: rows of other lengths are copied before.
    """
    blocks, options = split(_SLOTS.at(capability))
    types = {"position_ptr": "*i32", "slots_ptr": "*i16", **dict.fromkeys(("U", "K", "width"), "i32")}
    found = with_unaligned_rows([Specialisation(_slots_kernel, types, blocks, options, wide=True)])
    for dtype, name in TYPE_NAMES.items():
        for factor in dict.fromkeys((None, "fp32", name)):
            found += [_scores_variant(dtype, factor, backward, capability) for backward in (False, True)]
        blocks, options = split(_tables(dtype)[2].at(capability))
        data = f"*{name}"
        # The products with a transpose are the row gradients, which can be asked for in float32.
        kinds = [(False, base, data) for base in (False, True)]
        kinds += [(True, False, out) for out in dict.fromkeys((data, "*fp32"))]
        for transposed, base, out in kinds:
            types = {"a_ptr": data, "b_ptr": data, "out_ptr": out} | ({"base_ptr": data} if base else {})
            types |= dict.fromkeys(("M", "N", "K", "width", "stride_base"), "i32")
            constants = blocks | {"TRANSPOSED": transposed, "BASE": base, "PRECISION": "ieee"}
            constants |= {} if base else {"base_ptr": None}
            found.append(Specialisation(_product_kernel, types, constants, options, wide=True))
    return found + sparse_ffn_token_triton.variants(capability)


def _scores_variant(dtype: torch.dtype, factor: str | None, backward: bool, capability: int | None) -> Specialisation:
    data = ["x_ptr", "keys_ptr", "active_ptr"] + (["g_ptr", "values_ptr", "bykey_ptr"] if backward else [])
    factors = (["factors_ptr"] + (["dfactors_ptr"] if backward else [])) if factor else []
    types = {"slots_ptr": "*i16"} | dict.fromkeys(data, f"*{TYPE_NAMES[dtype]}") | dict.fromkeys(factors, f"*{factor}")
    absent = {name for name in _scores_kernel.arg_names if name.endswith("_ptr")} - types.keys()
    types |= dict.fromkeys(("T", "U", "D", "K", "width", "stride_x", "stride_g"), "i32")
    blocks, options = split(_tables(dtype)[backward].at(capability))
    constants = blocks | dict.fromkeys(absent) | {"FACTOR": factor is not None, "BACKWARD": backward}
    return Specialisation(_scores_kernel, types, constants | {"PRECISION": "ieee"}, options, wide=True)
