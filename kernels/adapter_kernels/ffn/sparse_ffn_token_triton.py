"""The kernels of `sparse_ffn` for the few tokens of decoding: a program reads the rows of one token's picks.

Ordinary arithmetic in fp32, and no tensor of tokens by rows: forward only, from at most MAX_TOKENS tokens on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime import dispatch
from ..runtime import launch_config as launch
from ..runtime.specialisation import TYPE_NAMES, Specialisation, split, with_unaligned_rows
from ..runtime.triton_shim import kernel, tl, triton

# Derived, not measured: tensor cores take 16 tokens at least, and a token's 64 picks read by 32 and 64 programs keep
# more of the memory busy than the few tiles of a GEMM with so few rows.
MAX_TOKENS = 16

# Derived, not measured: 16 sums a lane; a row of 4,096 in 4 turns, a column block of 64 in half precision is 128 bytes.
_TOKEN_SCORES = launch.Table("sparse_ffn.token_scores", {"BR": 2, "BK": 1024, "num_warps": 4, "num_stages": 2})
_TOKEN_VALUES = launch.Table("sparse_ffn.token_values", {"BR": 32, "BN": 64, "num_warps": 4, "num_stages": 2})


@kernel("D", "stride_x")
def _token_scores_kernel(
    x_ptr, keys_ptr, position_ptr, factors_ptr, active_ptr, U, D, K, stride_x,
    FACTOR: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Programs (token, BR of its picks)."""
    t = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BR + tl.arange(0, BR)
    row = tl.load(position_ptr + t * K + j, mask=j < K, other=-1)
    live = (row >= 0) & (row < U)
    total = tl.zeros((BR, BK), tl.float32)
    for done in range(0, D, BK):
        k = done + tl.arange(0, BK)
        x = tl.load(x_ptr + t * stride_x + k, mask=k < D, other=0.0).to(tl.float32)
        key = keys_ptr + row.to(tl.int64)[:, None] * D + k[None, :]
        total += x[None, :] * tl.load(key, mask=live[:, None] & (k < D)[None, :], other=0.0).to(tl.float32)
    score = tl.sum(total, 1)
    if FACTOR:
        score = score * tl.load(factors_ptr + t * K + j, mask=live, other=0.0).to(tl.float32)
    tl.store(active_ptr + t * K + j, tl.where(live & (score > 0), score, 0.0), mask=j < K)


@kernel("D", "stride_base")
def _token_values_kernel(
    active_ptr, values_ptr, position_ptr, base_ptr, out_ptr, U, D, K, stride_base,
    BASE: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Programs (token, BN columns)."""
    t = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BR, BN), tl.float32)
    for first in range(0, K, BR):
        j = first + tl.arange(0, BR)
        row = tl.load(position_ptr + t * K + j, mask=j < K, other=-1)
        live = (row >= 0) & (row < U)
        active = tl.load(active_ptr + t * K + j, mask=live, other=0.0)
        value = values_ptr + row.to(tl.int64)[:, None] * D + n[None, :]
        total += active[:, None] * tl.load(value, mask=live[:, None] & (n < D)[None, :], other=0.0).to(tl.float32)
    out = tl.sum(total, 0)
    if BASE:
        out += tl.load(base_ptr + t * stride_base + n, mask=n < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + t * D + n, out.to(out_ptr.dtype.element_ty), mask=n < D)


def forward(
    x: Tensor, keys: Tensor, values: Tensor, position: Tensor, factors: Tensor | None, base: Tensor | None
) -> Tensor:
    """y, at least one token and one row given; rows of x and base in one piece each, all else contiguous."""
    (T, D), (U, K) = x.shape, (len(keys), position.shape[1])
    with dispatch.device_guard(x.device):
        active = dispatch.empty((T, K), torch.float32, x.device)
        out = dispatch.empty((T, D), x.dtype, x.device)
        config = _TOKEN_SCORES.on(x.device)
        _token_scores_kernel[(T, triton.cdiv(K, config["BR"]))](
            x, keys, position, factors, active, U, D, K, x.stride(0), FACTOR=factors is not None, **config
        )
        config, stride = _TOKEN_VALUES.on(x.device), base.stride(0) if base is not None else 0
        _token_values_kernel[(T, triton.cdiv(D, config["BN"]))](
            active, values, position, base, out, U, D, K, stride, BASE=base is not None, **config
        )
        return out


def variants(capability: int | None) -> list[Specialisation]:
    """What a launch can be: every dtype; with and without a base; factors in the dtype of x or in fp32, or none."""
    found = []
    for name in TYPE_NAMES.values():
        data = f"*{name}"
        types = {"position_ptr": "*i32", "active_ptr": "*fp32"} | dict.fromkeys("UDK", "i32")
        blocks, options = split(_TOKEN_SCORES.at(capability))
        for factor in dict.fromkeys((None, "fp32", name)):
            factored = {"factors_ptr": f"*{factor}"} if factor else {}
            constants = blocks | ({} if factor else {"factors_ptr": None}) | {"FACTOR": factor is not None}
            scores = types | {"x_ptr": data, "keys_ptr": data, "stride_x": "i32"} | factored
            found.append(Specialisation(_token_scores_kernel, scores, constants, options, wide=True))
        blocks, options = split(_TOKEN_VALUES.at(capability))
        for base in (False, True):
            constants = blocks | ({} if base else {"base_ptr": None}) | {"BASE": base}
            values = types | {"values_ptr": data, "out_ptr": data, "stride_base": "i32"}
            values |= {"base_ptr": data} if base else {}
            found.append(Specialisation(_token_values_kernel, values, constants, options, wide=True))
    return with_unaligned_rows(found)
