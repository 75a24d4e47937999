"""The kernels of `row_adamw`, which says what they compute, and their launches."""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime import dispatch
from ..runtime import launch_config as launch
from ..runtime.specialisation import TYPE_NAMES, Specialisation, split, with_unaligned_rows
from ..runtime.triton_shim import kernel, tl, triton
from .row_state import RowState, StepRule

# Derived, not measured: one row a lane; 1,600 rows are 13 programs.
_PREPARE = launch.Table("row_adamw.prepare", {"BLOCK": 128, "num_warps": 4, "num_stages": 1})
# Derived, not measured. A program has 1,024 values of three fp32 tables under way, 12 KiB: on the link 16 have 192 KiB,
# twice what 64 GB/s at 1.5 microseconds need, since a program reads for half of its time; 2,048 on the device
# are enough to fill each of 132 multiprocessors with 16 blocks of 4 warps.
_STEP = launch.Table(
    "row_adamw.step", {"BN": 1024, "HOST_PROGRAMS": 16, "DEVICE_PROGRAMS": 2048, "num_warps": 4, "num_stages": 1}
)
# Odd constants of the noise's hash: of the row, of its count, of the seed.
SPLITMIX = (0x9E3779B97F4A7C15, 0xD1342543DE82EF95, 0xDA942042E4DD58B5)


def signed(constant: int) -> int:
    return (constant + (1 << 63)) % (1 << 64) - (1 << 63)


@triton.jit
def _powers(n, high, low):
    """beta^n in float64; beta comes as two fp32, since a launch rounds its arguments to that."""
    base = (tl.zeros_like(n) + high).to(tl.float64) + (tl.zeros_like(n) + low).to(tl.float64)
    power = tl.full(n.shape, 1.0, tl.float64)
    # 2^31 touches at most; a step of one row each second would take 68 years.
    for _ in range(31):
        power = tl.where((n & 1) != 0, power * base, power)
        base = base * base
        n = n >> 1
    return power


@kernel()
def _prepare_kernel(
    rows_ptr, counts_ptr, keys_ptr, bias_ptr, n, r, lr_high, lr_low, beta1_high, beta1_low, beta2_high, beta2_low, seed,
    C1: tl.constexpr, C2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a lane: its count, the key of its noise, lr / (1 - beta1^n) and sqrt(1 - beta2^n)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows_ptr + i, mask=i < n, other=-1).to(tl.int64)
    inside = (row >= 0) & (row < r)
    touch = tl.load(counts_ptr + row, mask=inside, other=0) + 1
    tl.store(counts_ptr + row, touch, mask=inside)
    key = row * C1 + touch.to(tl.int64) * C2 + seed
    key = (key ^ ((key >> 30) & 0x3FFFFFFFF)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    key = (key ^ ((key >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685  # 0x94D049BB133111EB
    tl.store(keys_ptr + i, key ^ ((key >> 31) & 0x1FFFFFFFF), mask=i < n)
    lr = (tl.zeros_like(touch) + lr_high).to(tl.float64) + (tl.zeros_like(touch) + lr_low).to(tl.float64)
    step_size = lr / (1.0 - _powers(touch, beta1_high, beta1_low))
    root2 = tl.sqrt(1.0 - _powers(touch, beta2_high, beta2_low))
    tl.store(bias_ptr + 2 * i, step_size.to(tl.float32), mask=i < n)
    tl.store(bias_ptr + 2 * i + 1, root2.to(tl.float32), mask=i < n)


@kernel("D")
def _step_kernel(
    table_ptr, m_ptr, v_ptr, copy_ptr, rows_ptr, grads_ptr, keys_ptr, bias_ptr, n, r, D,
    mix, beta2, fresh2, eps, decay, coupled,
    STOCHASTIC: tl.constexpr, COPY: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Persistent programs over (row, BN of its columns). Compiled without contraction into fma."""
    blocks = tl.cdiv(D, BN)
    for item in range(tl.program_id(0), n * blocks, tl.num_programs(0)):
        i = item // blocks
        c = (item % blocks) * BN + tl.arange(0, BN)
        row = tl.load(rows_ptr + i).to(tl.int64)
        mask = c < tl.where((row >= 0) & (row < r), D, 0)
        offset = row * D + c
        g = tl.load(grads_ptr + i.to(tl.int64) * D + c, mask=mask, other=0.0).to(tl.float32)
        p = tl.load(table_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(m_ptr + offset, mask=mask, other=0.0)
        v = tl.load(v_ptr + offset, mask=mask, other=0.0)
        # Selected and not compiled in: the kernel waits for memory, and there are a quarter as many of it.
        g = tl.where(coupled != 0, g + p * coupled, g)
        moved = (g - m) * mix
        m = tl.where(mix <= 0, g, m) + moved  # from the gradient if 1 - beta1 >= 0.5: mix is -beta1 then, else positive
        v = v * beta2 + (g * fresh2) * g
        step_size = tl.load(bias_ptr + 2 * i)
        root2 = tl.load(bias_ptr + 2 * i + 1)
        scale = tl.div_rn(tl.sqrt_rn(v), tl.zeros_like(v) + root2) + eps
        p = p * decay - tl.div_rn(m * step_size, scale)
        if STOCHASTIC:
            key = tl.load(keys_ptr + i)
            noise = key.to(tl.uint32) + c.to(tl.uint32) * 0x9E3779B1
            noise = (noise ^ (noise >> 16)) * 0x7FEB352D
            noise = (noise ^ (noise >> 15) ^ (key >> 32).to(tl.uint32)) * 0x846CA68B
            noise = (noise ^ (noise >> 16)) & 0xFFFF
            bits = p.to(tl.uint32, bitcast=True)
            finite = (bits & 0x7F800000) != 0x7F800000
            p = tl.where(finite, (bits + noise) & 0xFFFF0000, bits).to(tl.float32, bitcast=True)
        tl.store(m_ptr + offset, m, mask=mask)
        tl.store(v_ptr + offset, v, mask=mask)
        tl.store(table_ptr + offset, p.to(table_ptr.dtype.element_ty), mask=mask)
        if COPY:
            tl.store(copy_ptr + offset, p.to(copy_ptr.dtype.element_ty), mask=mask)


def _halves(value: float) -> tuple[float, float]:
    """fp32 numbers whose sum is the float64 to 48 bits."""
    high = float(torch.tensor(value, dtype=torch.float32, device="cpu"))
    return high, value - high


def step(state: RowState, rows: Tensor, grads: Tensor, rule: StepRule, seed: int) -> None:
    """Launch both, for at least one row; all tensors contiguous."""
    table, n, (r, D) = state.table, len(rows), state.table.shape
    config = _STEP.on(rows.device)
    on_host, on_device = config.pop("HOST_PROGRAMS"), config.pop("DEVICE_PROGRAMS")
    programs = min(on_device if table.device == rows.device else on_host, n * triton.cdiv(D, config["BN"]))
    rows = dispatch.int32(rows)
    keys = dispatch.empty((n,), torch.int64, rows.device)
    bias = dispatch.empty((n, 2), torch.float32, rows.device)
    first, second, third = map(signed, SPLITMIX)
    prepare = _PREPARE.on(rows.device)
    with dispatch.device_guard(rows.device):
        _prepare_kernel[(triton.cdiv(n, prepare["BLOCK"]),)](
            rows, state.counts, keys, bias, n, r, *_halves(rule.lr), *_halves(rule.beta1), *_halves(rule.beta2),
            signed(seed * third), C1=first, C2=second, **prepare,
        )  # fmt: skip
        _step_kernel[(programs,)](
            table, state.exp_avg, state.exp_avg_sq, state.compute_copy, rows, grads, keys, bias, n, r, D,
            rule.mix, rule.beta2, 1 - rule.beta2, rule.eps, rule.decay, rule.coupled,
            STOCHASTIC=table.dtype == torch.bfloat16, COPY=state.compute_copy is not None,
            enable_fp_fusion=False, **config,
        )  # fmt: skip


def variants(capability: int | None) -> list[Specialisation]:
    """All specialisations of a launch: each dtype of table, gradients and compute copy."""
    blocks, options = split(_PREPARE.at(capability))
    first, second, _ = map(signed, SPLITMIX)
    types = {"rows_ptr": "*i32", "counts_ptr": "*i32", "keys_ptr": "*i64", "bias_ptr": "*fp32", "n": "i32", "r": "i32"}
    types |= {f"{name}_{part}": "fp32" for name in ("lr", "beta1", "beta2") for part in ("high", "low")} | {
        "seed": "i64"
    }
    # A seed that fits 32 bits, as the 0 of fp32 tables does, comes as an i32.
    seeds = [types | {"seed": kind} for kind in ("i32", "i64")]
    specialisations = [
        Specialisation(_prepare_kernel, types, blocks | {"C1": first, "C2": second}, options) for types in seeds
    ]
    blocks, options = split(_STEP.at(capability))
    blocks = {"BN": blocks["BN"]}
    kinds = [("fp32", grads, copy) for grads in TYPE_NAMES.values() for copy in (None, "fp16", "bf16")]
    for table, grads, copy in kinds + [("bf16", grads, None) for grads in TYPE_NAMES.values()]:
        types = {"table_ptr": f"*{table}", "m_ptr": "*fp32", "v_ptr": "*fp32", "grads_ptr": f"*{grads}"}
        types |= {"rows_ptr": "*i32", "keys_ptr": "*i64", "bias_ptr": "*fp32"} | dict.fromkeys("nrD", "i32")
        types |= dict.fromkeys(("mix", "beta2", "fresh2", "eps", "decay", "coupled"), "fp32")
        types |= {"copy_ptr": f"*{copy}"} if copy else {}
        constants = blocks | ({} if copy else {"copy_ptr": None})
        constants |= {"STOCHASTIC": table == "bf16", "COPY": copy is not None}
        launched = options | {"enable_fp_fusion": False}
        specialisations.append(Specialisation(_step_kernel, types, constants, launched, wide=True))
    return with_unaligned_rows(specialisations)
