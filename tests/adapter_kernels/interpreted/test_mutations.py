"""The checks fail for kernels that are wrong: a line of the source is changed, and its check must notice."""

import importlib.util
import itertools
import sys
from functools import partial
from pathlib import Path

import kernel_checks
import pytest
import torch
from selection_checks import (
    Case,
    check_expert,
    check_expert_exactly,
    check_router,
    check_union,
    check_window,
    generator,
)

import adapter_kernels

SOURCE = Path(adapter_kernels.__file__).parent
numbers = itertools.count()


def load(folder, op, before, after):
    """The module of an op with one line changed; its torch.library ops get a name space of their own."""
    text = (SOURCE / f"{op}.py").read_text()
    assert text.count(before) == 1, f"{before!r} stands {text.count(before)} times in {op}.py"
    name = f"mutated_{next(numbers)}"
    file = folder / f"{name}.py"
    file.write_text(text.replace(before, after).replace('"adapter_kernels::', f'"{name}::'))
    # Below the package, for its relative imports.
    spec = importlib.util.spec_from_file_location(f"adapter_kernels.{name}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return partial(module.__dict__[op], impl="triton"), module


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
    ],
    ids=itertools.count(),
)
def test_a_wrong_kernel_is_noticed(tmp_path, op, check, before, after):
    with pytest.raises(AssertionError):
        check(*load(tmp_path, op, before, after))


@pytest.mark.parametrize(
    ("op", "check"), [("router_topk", router), ("expert_topk", expert), ("row_union", union), ("row_union", window)]
)
def test_the_right_one_passes(tmp_path, op, check):
    check(*load(tmp_path, op, "from . import dispatch, launch", "from . import dispatch, launch"))
