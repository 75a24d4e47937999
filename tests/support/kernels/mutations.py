"""Lines of kernels, what is put in their place, and the check that must notice; on any device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import adapter_kernels
from tests.support.kernels import kernel_checks
from tests.support.kernels.adamw_checks import Tables, check_adamw
from tests.support.kernels.ffn_checks import Case as FFNCase
from tests.support.kernels.ffn_checks import check_ffn, check_wide_row_gradients
from tests.support.kernels.mutants import mutant
from tests.support.kernels.on_device import on_device
from tests.support.kernels.row_checks import check_gather, check_scatter, table
from tests.support.kernels.selection_checks import (
    Case,
    check_expert,
    check_expert_exactly,
    check_load,
    check_router,
    check_union,
    check_window,
    generator,
)


class Kernels:
    """An op and others of the package, by their kernels on a device."""

    def __init__(self, op: Callable[..., Any], device: torch.device | str) -> None:
        self.op, self.device = on_device(op, device), device

    def other(self, name: str) -> Callable[..., Any]:
        return on_device(partial(getattr(adapter_kernels, name), impl="triton"), self.device)


class Mutation(NamedTuple):
    """Attributes: before: stands once in the op's kernels."""

    op: str
    check: Callable[[Kernels], None]
    before: str
    after: str


def _router(kernels: Kernels) -> None:
    logits = torch.tensor([[0.0, -0.0, 1.0], [-0.0, 0.0, -1.0], [torch.nan, 1.0, 2.0]])
    check_router(kernels.op, logits, 2)


def _expert(kernels: Kernels) -> None:
    with adapter_kernels.override("expert_topk.dots_fp32", SPLITS=1):
        check_expert(kernels.op, Case(40, 16, E=1, each=5, P=1, K=3))
    check_expert_exactly(kernels.op, Case(10, 16, E=3, each=5, P=2, K=4, integers=True))


def _union(kernels: Kernels) -> None:
    check_union(kernels.op, torch.randint(-1, 3000, (20, 10), generator=generator(), dtype=torch.int32), 3000)


def _window(kernels: Kernels) -> None:
    check_window(kernels.other("row_union_window"), torch.arange(50).view(10, 5), 50, 20)


def _load(kernels: Kernels) -> None:
    ids = torch.randint(-1, 30, (20, 10), generator=generator(), dtype=torch.int32)
    check_load(kernels.other("row_union_window"), ids, 30, 6)


def _gather(kernels: Kernels) -> None:
    ids = torch.randint(-1, 9, (21,), generator=generator())
    check_gather(kernels.op, ids, [table(9, 24, torch.bfloat16, seed) for seed in range(2)])
    check_scatter(kernels.other("scatter_rows"), torch.tensor([7, -1, 0]), [table(3, 24, torch.float32)], (9, 24))


def _ffn(kernels: Kernels) -> None:
    check_ffn(kernels.op, FFNCase(70, 100, 70, 5))
    check_ffn(kernels.op, FFNCase(20, 24, 7, 2, factor=False))


def _token_ffn(kernels: Kernels) -> None:
    check_ffn(kernels.op, FFNCase(2, 100, 9, 5))


def _wide_ffn(kernels: Kernels) -> None:
    backward = on_device(adapter_kernels.sparse_ffn_backward, kernels.device)
    check_wide_row_gradients("triton", FFNCase(256, 24, 9, 9, torch.bfloat16), backward)


def _adamw(kernels: Kernels) -> None:
    check_adamw(kernels.op, Tables(9, 33, compute_dtype=torch.bfloat16), torch.tensor([8, 0, 3]), torch.ones(3, 33))


def _adam(kernels: Kernels) -> None:
    tables = Tables(9, 33)
    check_adamw(kernels.op, tables, torch.tensor([8, 0, 3]), torch.zeros(3, 33), betas=(0.4, 0.9), decoupled=False)


def _adamw_bits(kernels: Kernels) -> None:
    ours, theirs = Tables(9, 33, torch.bfloat16), Tables(9, 33, torch.bfloat16)
    rows, grads = torch.tensor([8, 0, 3]), torch.ones(3, 33)
    ours.step(kernels.op, rows, grads, seed=3)
    theirs.step(adapter_kernels.row_adamw, rows, grads, seed=3)
    assert torch.equal(ours["table"], theirs["table"])


# Of each op the first stands for all where time is short.
MUTATIONS = [
    Mutation("router_topk", _router, "value == 0.0, 0.0, value", "value == 0.0, value, value"),
    Mutation("router_topk", _router, "value != value, 0x7FFFFFFF", "value != value, 0"),
    Mutation("router_topk", _router, "P + j, expert)", "P + j, expert + (t == 1))"),
    Mutation("expert_topk", _expert, "0xFFFFF - neuron", "0xFFFFE - neuron"),
    Mutation("expert_topk", _expert, "end, stride)", "end - BM, stride)"),
    Mutation("expert_topk", _expert, "(pair // P)", "(tl.maximum(pair - P, 0) // P)"),
    Mutation("expert_topk", _expert, "end, stride)", "end, stride + BM)"),
    Mutation("expert_topk", _expert, "live & (score > 0)", "live & (score > -1)"),
    Mutation("row_union", _union, "range(0, block)", "range(1, block)"),
    Mutation("row_union", _union, "places_ptr + row, mask=used", "places_ptr + row, mask=used & (i != 7)"),
    Mutation("row_union", _window, " & (place < capacity)", ""),
    Mutation("row_union", _window, "count - start > capacity", "count > capacity"),
    Mutation("row_union", _load, "row // rows_per_group, tl", "row // (rows_per_group + 1), tl"),
    Mutation("row_union", _load, "tl.int64), mask=used, sem", "tl.int64), mask=used & (i != 7), sem"),
    Mutation("gather_rows", _gather, "inside = (row >= 0) & (row < r)", "inside = (row >= 0) & (row < r) & (k != 4)"),
    Mutation("gather_rows", _gather, "row * D, k.to(tl.int64) * D, k < n", "row * D, k.to(tl.int64) * D, k < n - 1"),
    Mutation("gather_rows", _gather, "source2_ptr + source", "source_ptr + source"),
    Mutation("gather_rows", _gather, "k.to(tl.int64) * D, row * D, inside", "k.to(tl.int64) * D, row * D + 1, inside"),
    Mutation("sparse_ffn", _ffn, "ds = ds * factor", "ds = ds"),
    Mutation("sparse_ffn", _ffn, "(slot >= 0) & (score > 0)", "(slot >= 0) & (score > 0) & (m != 66)[:, None]"),
    Mutation("sparse_ffn", _ffn, "(slot >= 0) & (score > 0)", "score > 0"),
    Mutation("sparse_ffn", _ffn, "ds = tl.where(positive, ds, 0.0)", "ds = tl.where(slot >= 0, ds, 0.0)"),
    Mutation("sparse_ffn", _ffn, "inside = (m < M)", "inside = (m < M - 1)"),
    Mutation("sparse_ffn", _ffn, "range(0, K, BK):\n        k =", "range(0, K - BK, BK):\n        k ="),
    Mutation("sparse_ffn", _ffn, "total.to(out_ptr", "(total + 0.01 * (m == 65)[:, None]).to(out_ptr"),
    Mutation("sparse_ffn", _wide_ffn, "total.to(out_ptr", "total.to(b_ptr.dtype.element_ty).to(out_ptr"),
    Mutation("sparse_ffn", _token_ffn, "live & (score > 0)", "live & (score > 0) & (j != 3)"),
    Mutation("sparse_ffn", _token_ffn, "active[:, None] * tl.load", "tl.load"),
    Mutation("row_adamw", _adamw, "p * decay", "p"),
    Mutation("row_adamw", _adamw, "mask=inside, other=0) + 1", "mask=inside, other=0) + 2"),
    Mutation("row_adamw", _adam, "p * coupled", "m * coupled"),
    Mutation("row_adamw", _adam, "mix <= 0", "mix > 0"),
    Mutation("row_adamw", _adamw, "(item % blocks) * BN", "(item % blocks) * BN + 1"),
    Mutation("row_adamw", _adamw_bits, "(noise >> 15) ^ (key", "(noise >> 14) ^ (key"),
    Mutation("row_adamw", _adamw_bits, "0xBF58476D1CE4E5B9\n", "0\n    key = key + 1\n"),
]
PAIRS = list(dict.fromkeys((each.op, each.check) for each in MUTATIONS))  # an op, and a check that is used for it


def run(mutation: Mutation, folder: Path, device: torch.device | str) -> None:
    """The check of the changed kernel, in poisoned and fenced memory: raises if it notices."""
    with pytest.MonkeyPatch.context() as patch:
        op = mutant(folder, patch, mutation.op, mutation.before, mutation.after)
        with kernel_checks.fenced_memory(patch):
            mutation.check(Kernels(op, device))


def is_noticed(mutation: Mutation, folder: Path, device: torch.device | str) -> bool:
    try:
        run(mutation, folder, device)
    except AssertionError:
        return True
    return False
