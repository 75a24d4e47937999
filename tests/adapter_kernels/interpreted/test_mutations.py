"""The checks fail for kernels that are wrong: a line of the source is changed, and its check must notice."""

import itertools
from functools import partial

import kernel_checks
import pytest
import torch
from mutants import mutant
from selection_checks import (
    Case,
    check_expert,
    check_expert_exactly,
    check_load,
    check_router,
    check_union,
    check_window,
    generator,
)

import adapter_kernels


def router(op, module):
    logits = torch.tensor([[0.0, -0.0, 1.0], [-0.0, 0.0, -1.0], [torch.nan, 1.0, 2.0]])
    check_router(op, logits, 2)


def expert(op, module):
    with adapter_kernels.override("expert_topk.dots_fp32", SPLITS=1):
        check_expert(op, Case(40, 16, E=1, each=5, P=1, K=3))
    check_expert_exactly(op, Case(10, 16, E=3, each=5, P=2, K=4, integers=True))


def union(op, module):
    check_union(op, torch.randint(-1, 3000, (20, 10), generator=generator(), dtype=torch.int32), 3000)


def window(op, module):
    ids = torch.arange(50).view(10, 5)
    with pytest.MonkeyPatch.context() as patch, kernel_checks.fenced_memory(patch):
        check_window(partial(module.row_union_window, impl="triton"), ids, 50, 20)


def load(op, module):
    ids = torch.randint(-1, 30, (20, 10), generator=generator(), dtype=torch.int32)
    check_load(partial(module.row_union_window, impl="triton"), ids, 30, 6)


@pytest.mark.parametrize(
    ("op", "check", "before", "after"),
    [
        ("router_topk", router, "value == 0.0, 0.0, value", "value == 0.0, value, value"),
        ("router_topk", router, "value != value, 0x7FFFFFFF", "value != value, 0"),
        ("router_topk", router, "P + j, expert)", "P + j, expert + (t == 1))"),
        ("expert_topk", expert, "end, stride)", "end - BM, stride)"),
        ("expert_topk", expert, "(pair // P)", "(tl.maximum(pair - P, 0) // P)"),
        ("expert_topk", expert, "end, stride)", "end, stride + BM)"),
        ("expert_topk", expert, "live & (score > 0)", "live & (score > -1)"),
        ("expert_topk", expert, "0xFFFFF - neuron", "0xFFFFE - neuron"),
        ("row_union", union, "range(0, block)", "range(1, block)"),
        ("row_union", union, "places_ptr + row, mask=used", "places_ptr + row, mask=used & (i != 7)"),
        ("row_union", window, " & (place < capacity)", ""),
        ("row_union", window, "count - start > capacity", "count > capacity"),
        ("row_union", load, "row // each, tl", "row // (each + 1), tl"),
        ("row_union", load, "tl.int64), mask=used, sem", "tl.int64), mask=used & (i != 7), sem"),
    ],
    ids=itertools.count(),
)
def test_a_wrong_kernel_is_noticed(tmp_path, monkeypatch, op, check, before, after):
    with pytest.raises(AssertionError):
        check(*mutant(tmp_path, monkeypatch, op, before, after))


@pytest.mark.parametrize(
    ("op", "check"),
    [
        ("router_topk", router),
        ("expert_topk", expert),
        ("row_union", union),
        ("row_union", window),
        ("row_union", load),
    ],
)
def test_the_right_one_passes(tmp_path, monkeypatch, op, check):
    check(*mutant(tmp_path, monkeypatch, op, "import torch\n", "import torch\n"))
