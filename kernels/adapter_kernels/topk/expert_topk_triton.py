"""The three kernels of `expert_topk`, and their launches.

Three kernels, and nothing of [T, r]: only [T, P, r/E] of dots in fp32, that is P/E of it.
1. `group`: one program an expert reads all T P expert ids, counts those of lower experts (where its own list begins)
   and then writes its own pairs t P + p in ascending order. No sort, no atomics, so always in the same order.
2. `dots`: a program takes a tile of one expert's pairs: a small GEMM of the gathered tokens with the expert's keys,
   accumulated in fp32. So each key is read about once and each token P times, from the L2 cache.
3. `pick`: one program a token. Positive floats order as their bits do, so a score, the reversed neuron and the place of
   its dot make one int64, and a bitonic top-k of those also breaks the ties.

Limits: x and keys of one dtype, no float64, P r/E <= 1024 candidates, K <= 256, r <= 2^20, E <= 1024.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..runtime import dispatch
from ..runtime import launch_config as launch
from ..runtime.specialisation import KINDS_OF_ROWS, TYPE_NAMES, Specialisation, split, unaligned, with_unaligned_rows
from ..runtime.triton_shim import kernel, tl, triton

MAX_CANDIDATES = 1024
MAX_PICKS = 256
MAX_NEURONS = 1 << 20
MAX_EXPERTS = 1024

# Derived, not measured: all ids of a usual call (T 512, P 8) in four chunks, 8 a lane.
_GROUP = launch.Table("expert_topk.group", {"BLOCK": 1024, "num_warps": 4, "num_stages": 1})

# Derived, not measured. An expert has about T P / E = 13 pairs at T 512, E 320, P 8, so BM 16, the least that the
# tensor cores take, wastes least. The kernel is bound by bytes: what counts is bytes in flight, (BM + BN) BK itemsize
# of them a stage; 4 stages of 16 + 32 rows of 256 B keep 48 KiB in flight a block and leave room for two blocks a
# multiprocessor on sm_86/89 (99 KiB). Larger shared memory takes longer rows. SPLITS: programs that share one expert's
# tiles, since without a balancing loss a few experts get most tokens.
_DOTS = launch.Table(
    "expert_topk.dots",
    {"BM": 16, "BK": 128, "SPLITS": 8, "num_warps": 4, "num_stages": 4},
    {80: {"BK": 256, "num_stages": 3}, 90: {"BK": 256, "num_stages": 4}},
)
# Derived, not measured: rows that are no multiples of 16 values are read value by value, each at an address of its own:
# a short BK avoids spills, and what is read so is not staged.
_DOTS_UNALIGNED = launch.Table(
    "expert_topk.dots_odd", {"BM": 16, "BK": 64, "SPLITS": 8, "num_warps": 4, "num_stages": 2}
)
# Derived, not measured: fp32 products run on the ordinary cores ("ieee": tf32 would round the inputs to 10 bits and so
# change picks), which keep operands in registers: a short BK avoids spills.
_DOTS_FP32 = launch.Table("expert_topk.dots_fp32", {"BM": 16, "BK": 32, "SPLITS": 8, "num_warps": 4, "num_stages": 3})
# Derived, not measured: 8 int64 a lane, as much as stays in registers through the bitonic network.
_PICK = launch.Table("expert_topk.pick", {"num_warps": 1, "num_stages": 1})
_PICK_WIDE = launch.Table("expert_topk.pick_wide", {"num_warps": 4, "num_stages": 1})


@kernel("n")
def _group_kernel(experts_ptr, pairs_ptr, spans_ptr, n, BLOCK: tl.constexpr):
    """One program an expert; spans[e] = where its pairs begin and end."""
    e = tl.program_id(0)
    begin = 0
    for i in range(0, n, BLOCK):
        at = i + tl.arange(0, BLOCK)
        expert = tl.load(experts_ptr + at, mask=at < n, other=-1)
        begin += tl.sum(((expert >= 0) & (expert < e)).to(tl.int32), 0)
    end = begin
    for i in range(0, n, BLOCK):
        at = i + tl.arange(0, BLOCK)
        own = tl.load(experts_ptr + at, mask=at < n, other=-1) == e
        count = own.to(tl.int32)
        tl.store(pairs_ptr + end + tl.cumsum(count, 0) - 1, at, mask=own)
        end += tl.sum(count, 0)
    tl.store(spans_ptr + 2 * e, begin)
    tl.store(spans_ptr + 2 * e + 1, end)


@kernel("D", "stride_x")
def _dots_kernel(
    x_ptr, keys_ptr, pairs_ptr, spans_ptr, dots_ptr, D, P, neurons_per_expert, stride_x,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs (expert, share of its tiles, block of its neurons)."""
    e = tl.program_id(0)
    end = tl.load(spans_ptr + 2 * e + 1)
    column = tl.program_id(2) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    key = keys_ptr + (e.to(tl.int64) * neurons_per_expert + column)[None, :] * D + k[:, None]
    stride = tl.num_programs(1) * BM
    for first in range(tl.load(spans_ptr + 2 * e) + tl.program_id(1) * BM, end, stride):
        m = first + tl.arange(0, BM)
        pair = tl.load(pairs_ptr + m, mask=m < end, other=0)
        token = x_ptr + (pair // P).to(tl.int64)[:, None] * stride_x + k[None, :]
        total = tl.zeros((BM, BN), tl.float32)
        for done in range(0, D, BK):
            a = tl.load(token + done, mask=(m < end)[:, None] & (k < D - done)[None, :], other=0.0)
            b = tl.load(key + done, mask=(column < neurons_per_expert)[None, :] & (k < D - done)[:, None], other=0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION)
        out = dots_ptr + pair.to(tl.int64)[:, None] * neurons_per_expert + column[None, :]
        tl.store(out, total, mask=(m < end)[:, None] & (column < neurons_per_expert)[None, :])


@kernel()
def _pick_kernel(
    dots_ptr, experts_ptr, factors_ptr, ids_ptr, scores_ptr, picked_ptr, E, P, neurons_per_expert, K,
    FACTOR: tl.constexpr, CANDIDATES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program a token. In a key: 31 bits of score, 20 of reversed neuron, 12 of candidate; 0 is no pick."""
    t = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CANDIDATES)
    live = c < P * neurons_per_expert
    slot = t * P + c // neurons_per_expert
    expert = tl.load(experts_ptr + slot, mask=live, other=-1)
    live = live & (expert >= 0) & (expert < E)
    score = tl.load(dots_ptr + t * P * neurons_per_expert + c, mask=live, other=0.0)
    if FACTOR:
        score = score * tl.load(factors_ptr + slot, mask=live, other=0.0).to(tl.float32)
    neuron = expert * neurons_per_expert + c % neurons_per_expert
    live = live & (score > 0)
    low = ((0xFFFFF - neuron).to(tl.int64) << 12) | c.to(tl.int64)
    key = (score.to(tl.int32, bitcast=True).to(tl.int64) << 32) | low
    top = tl.topk(tl.where(live, key, 0), WIDTH)
    j = tl.arange(0, WIDTH)
    used = top > 0
    neuron = 0xFFFFF - ((top >> 12) & 0xFFFFF).to(tl.int32)
    dot = tl.load(dots_ptr + t * P * neurons_per_expert + (top & 0xFFF), mask=used, other=0.0)
    tl.store(ids_ptr + t * K + j, tl.where(used, neuron, -1), mask=j < K)
    tl.store(scores_ptr + t * K + j, (top >> 32).to(tl.int32).to(tl.float32, bitcast=True), mask=j < K)
    tl.store(picked_ptr + t * K + j, dot, mask=j < K)


def _column_block(neurons_per_expert: int, dtype: torch.dtype) -> int:
    # 64 columns of fp32 spill on sm_80; in half precision they do not.
    return min(32 if dtype == torch.float32 else 64, max(16, triton.next_power_of_2(neurons_per_expert)))


def _pick_config(candidates: int, K: int, capability: int | None) -> launch.Config:
    """Few sizes, so that few kernels are compiled."""
    wide = candidates > 256
    width = next(w for w in (64, 256) if w >= min(K, candidates))
    table = _PICK_WIDE if wide else _PICK
    return table.at(capability) | {"CANDIDATES": MAX_CANDIDATES if wide else 256, "WIDTH": width}


def _dots_table(dtype: torch.dtype, unaligned_rows: bool) -> launch.Table:
    if dtype == torch.float32:
        return _DOTS_FP32
    return _DOTS_UNALIGNED if unaligned_rows else _DOTS


def unsupported(x: Tensor, keys: Tensor, P: int, K: int, E: int) -> Iterator[tuple[str, str]]:
    """What the kernels do not take: the argument, and why."""
    neurons_per_expert = len(keys) // E
    if x.dtype not in dispatch.FLOATS:
        yield "x", f"the Triton kernel has no {x.dtype}"
    if keys.dtype != x.dtype:
        yield "keys", f"{keys.dtype}, but x is {x.dtype}: the Triton kernel multiplies one dtype"
    if E > MAX_EXPERTS:
        yield "E", f"the Triton kernel takes 1 to {MAX_EXPERTS}, not {E}"
    if P * neurons_per_expert > MAX_CANDIDATES:
        yield "experts", f"{P} experts of {neurons_per_expert} neurons are more than {MAX_CANDIDATES} candidates"
    if K > MAX_PICKS:
        yield "K", f"at most {MAX_PICKS} is possible, not {K}"
    if len(keys) > MAX_NEURONS:
        yield "keys", f"{len(keys)} rows are more than {MAX_NEURONS}"


def select(
    x: Tensor, keys: Tensor, experts: Tensor, factors: Tensor | None, K: int, E: int
) -> tuple[Tensor, Tensor, Tensor]:
    """ids, scores and dots, [T, K], in descending order of score."""
    (T, D), device = x.shape, x.device
    P, neurons_per_expert = experts.shape[1], keys.shape[0] // E
    x, experts = dispatch.rows_apart(x), dispatch.int32(experts).contiguous()
    factors = factors.contiguous() if factors is not None else None
    ids = dispatch.empty((T, K), torch.int32, device)
    scores = dispatch.empty((T, K), torch.float32, device)
    picked = dispatch.empty((T, K), torch.float32, device)
    if T == 0 or K == 0:
        return ids, scores, picked
    pairs = dispatch.empty((T * P,), torch.int32, device)
    spans = dispatch.empty((E, 2), torch.int32, device)
    dots = dispatch.empty((T * P, neurons_per_expert), torch.float32, device)
    config = _dots_table(x.dtype, unaligned(D, x.stride(0))).on(device)
    splits = min(config.pop("SPLITS"), triton.cdiv(T, config["BM"]))
    block = _column_block(neurons_per_expert, x.dtype)
    pick = _pick_config(P * neurons_per_expert, K, launch.capability(device))
    if pick["WIDTH"] < K:  # more columns than candidates: no program writes the last ones
        ids.fill_(-1)
        scores.zero_()
        picked.zero_()
    with dispatch.device_guard(device):
        _group_kernel[(E,)](experts, pairs, spans, T * P, **_GROUP.on(device))
        _dots_kernel[(E, splits, triton.cdiv(neurons_per_expert, block))](
            x, keys, pairs, spans, dots, D, P, neurons_per_expert, x.stride(0), BN=block, PRECISION="ieee", **config
        )
        _pick_kernel[(T,)](
            dots, experts, factors, ids, scores, picked, E, P, neurons_per_expert, K, FACTOR=factors is not None, **pick
        )
    return ids, scores, picked


def variants(capability: int | None) -> list[Specialisation]:
    """What a launch can be: every dtype, block and width."""
    found: list[Specialisation] = []
    blocks, options = split(_GROUP.at(capability))
    types = {"experts_ptr": "*i32", "pairs_ptr": "*i32", "spans_ptr": "*i32", "n": "i32"}
    found += with_unaligned_rows([Specialisation(_group_kernel, types, blocks, options, wide=True)])
    for dtype, name, unaligned_rows in KINDS_OF_ROWS:
        blocks, options = split(_dots_table(dtype, unaligned_rows).at(capability))
        del blocks["SPLITS"]
        types = {"x_ptr": f"*{name}", "keys_ptr": f"*{name}", "pairs_ptr": "*i32", "spans_ptr": "*i32"}
        types |= {"dots_ptr": "*fp32"} | dict.fromkeys(("D", "P", "neurons_per_expert", "stride_x"), "i32")
        for block in sorted(
            {_column_block(neurons_per_expert, dtype) for neurons_per_expert in range(1, MAX_CANDIDATES + 1)}
        ):
            constants = blocks | {"BN": block, "PRECISION": "ieee"}
            found.append(
                Specialisation(
                    _dots_kernel, types, constants, options, aligned=not unaligned_rows, wide=not unaligned_rows
                )
            )
    picks = {tuple(_pick_config(c, K, capability).items()) for c in (256, MAX_CANDIDATES) for K in range(1, 257)}
    for pick in sorted(picks):
        blocks, options = split(dict(pick))
        types = {"dots_ptr": "*fp32", "experts_ptr": "*i32", "ids_ptr": "*i32", "scores_ptr": "*fp32"}
        types |= {"picked_ptr": "*fp32"} | dict.fromkeys(("E", "P", "neurons_per_expert", "K"), "i32")
        found.append(Specialisation(_pick_kernel, types, blocks | {"FACTOR": False, "factors_ptr": None}, options))
        for name in TYPE_NAMES.values():
            with_factor = types | {"factors_ptr": f"*{name}"}
            found.append(Specialisation(_pick_kernel, with_factor, blocks | {"FACTOR": True}, options))
    return found
