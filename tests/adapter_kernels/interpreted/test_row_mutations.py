"""As test_mutations, for the ops on rows: a changed line must fail the op's check."""

import importlib.util
import itertools
import sys
from functools import partial
from pathlib import Path

import kernel_checks
import pytest
import torch
from adamw_checks import Tables, check_adamw
from ffn_checks import Case, check_ffn
from lora_checks import Case as LoraCase
from lora_checks import check_lora
from row_checks import check_gather, check_scatter, table
from selection_checks import generator

import adapter_kernels

SOURCE = Path(adapter_kernels.__file__).parent
numbers = itertools.count()


def load(folder, name, before, after):
    """A module with one line changed; its torch.library ops get a name space of their own."""
    text = (SOURCE / f"{name}.py").read_text()
    assert text.count(before) == 1, f"{before!r} stands {text.count(before)} times in {name}.py"
    mutant = f"mutated_row_op_{next(numbers)}"
    file = folder / f"{mutant}.py"
    file.write_text(text.replace(before, after).replace('"adapter_kernels::', f'"{mutant}::'))
    # Below the package, for its relative imports.
    spec = importlib.util.spec_from_file_location(f"adapter_kernels.{mutant}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def in_fences(check):
    with pytest.MonkeyPatch.context() as patch, kernel_checks.fenced_memory(patch):
        check()


def gather(op, module):
    ids = torch.randint(-1, 9, (21,), generator=generator())
    tables = [table(9, 24, torch.bfloat16, seed) for seed in range(2)]
    in_fences(lambda: check_gather(op, ids, tables))
    scatter = partial(module.scatter_rows, impl="triton")
    check_scatter(scatter, torch.tensor([7, -1, 0]), [table(3, 24, torch.float32)], (9, 24))


def ffn(op, module):
    in_fences(lambda: check_ffn(op, Case(70, 100, 70, 5)))
    in_fences(lambda: check_ffn(op, Case(20, 24, 7, 2, factor=False)))


def token_ffn(op, module):
    in_fences(lambda: check_ffn(op, Case(2, 100, 9, 5)))


def adamw(op, module):
    check_adamw(op, Tables(9, 33, wire=torch.bfloat16), torch.tensor([8, 0, 3]), torch.ones(3, 33))


def adamw_bits(op, module):
    ours, theirs = Tables(9, 33, torch.bfloat16), Tables(9, 33, torch.bfloat16)
    rows, grads = torch.tensor([8, 0, 3]), torch.ones(3, 33)
    ours.step(op, rows, grads, seed=3)
    theirs.step(adapter_kernels.row_adamw, rows, grads, seed=3)
    assert torch.equal(ours["table"], theirs["table"])


def lora(op, module):
    in_fences(lambda: check_lora(op, LoraCase(20, 300, 5, [140, 7])))


KERNELS, ADAMW = "sparse_ffn_kernels", "row_adamw_kernels"


@pytest.mark.parametrize(
    ("op", "check", "before", "after"),
    [
        ("gather_rows", gather, "row * D, k.to(tl.int64) * D, k < n", "row * D, k.to(tl.int64) * D, k < n - 1"),
        ("gather_rows", gather, "inside = (row >= 0) & (row < r)", "inside = (row >= 0) & (row < r) & (k != 4)"),
        ("gather_rows", gather, "source2_ptr + source", "source_ptr + source"),
        ("gather_rows", gather, "k.to(tl.int64) * D, row * D, inside", "k.to(tl.int64) * D, row * D + 1, inside"),
        (KERNELS, ffn, "(slot >= 0) & (score > 0)", "(slot >= 0) & (score > 0) & (m != 66)[:, None]"),
        (KERNELS, ffn, "(slot >= 0) & (score > 0)", "score > 0"),
        (KERNELS, ffn, "ds = ds * factor", "ds = ds"),
        (KERNELS, ffn, "ds = tl.where(positive, ds, 0.0)", "ds = tl.where(slot >= 0, ds, 0.0)"),
        (KERNELS, ffn, "inside = (m < M)", "inside = (m < M - 1)"),
        (KERNELS, ffn, "range(0, K, BK):\n        k =", "range(0, K - BK, BK):\n        k ="),
        (KERNELS, ffn, "total.to(out_ptr", "(total + 0.01 * (m == 65)[:, None]).to(out_ptr"),
        (KERNELS, token_ffn, "live & (score > 0)", "live & (score > 0) & (j != 3)"),
        (KERNELS, token_ffn, "active[:, None] * tl.load", "tl.load"),
        (ADAMW, adamw, "mask=inside, other=0) + 1", "mask=inside, other=0) + 2"),
        (ADAMW, adamw, "p * decay", "p"),
        (ADAMW, adamw, "(item % blocks) * BN", "(item % blocks) * BN + 1"),
        (ADAMW, adamw_bits, "(noise >> 15) ^ (key", "(noise >> 14) ^ (key"),
        (ADAMW, adamw_bits, "0xBF58476D1CE4E5B9\n", "0\n    key = key + 1\n"),
        ("shared_lora", lora, "range(tl.program_id(1) * BK, D", "range(tl.program_id(1) * BK, D - BK"),
        ("shared_lora", lora, "+ m)[:, None] * R", "+ tl.maximum(m, 1))[:, None] * R"),
        ("shared_lora", lora, "range(pieces)", "range(pieces - 1)"),
        ("shared_lora", lora, "inside = (m < T)[:, None]", "inside = ((m < T) & (m != 19))[:, None]"),
    ],
    ids=itertools.count(),
)  # fmt: skip
def test_a_wrong_kernel_is_noticed(tmp_path, monkeypatch, op, check, before, after):
    with pytest.raises(AssertionError):
        run(tmp_path, monkeypatch, op, check, before, after)


@pytest.mark.parametrize(
    ("op", "check"),
    [
        ("gather_rows", gather),
        (KERNELS, ffn),
        (KERNELS, token_ffn),
        (ADAMW, adamw),
        (ADAMW, adamw_bits),
        ("shared_lora", lora),
    ],
)
def test_the_right_one_passes(tmp_path, monkeypatch, op, check):
    run(tmp_path, monkeypatch, op, check, "import torch\n", "import torch\n")


def run(folder, monkeypatch, op, check, before, after):
    module = load(folder, op, before, after)
    # Where kernels have a module of their own, the op stays and gets others.
    if op == KERNELS:
        for name in ("forward", "backward"):
            monkeypatch.setattr(adapter_kernels.sparse_ffn_kernels, name, getattr(module, name))
        check(partial(adapter_kernels.sparse_ffn, impl="triton"), module)
    elif op == ADAMW:
        monkeypatch.setattr(adapter_kernels.row_adamw_kernels, "step", module.step)
        check(partial(adapter_kernels.row_adamw, impl="triton"), module)
    else:
        check(partial(getattr(module, op), impl="triton"), module)
