"""As test_mutations, for the ops on rows: a changed line must fail the op's check."""

import itertools
from functools import partial

import kernel_checks
import pytest
import torch
from adamw_checks import Tables, check_adamw
from ffn_checks import Case, check_ffn, check_wide_row_gradients
from lora_checks import Case as LoraCase
from lora_checks import check_lora
from mutants import mutant
from row_checks import check_gather, check_scatter, table
from selection_checks import generator

import adapter_kernels


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


def wide_ffn(op, module):
    in_fences(lambda: check_wide_row_gradients("triton", Case(600, 24, 9, 9, torch.bfloat16)))


def adamw(op, module):
    check_adamw(op, Tables(9, 33, wire=torch.bfloat16), torch.tensor([8, 0, 3]), torch.ones(3, 33))


def adam(op, module):
    tables = Tables(9, 33)
    check_adamw(op, tables, torch.tensor([8, 0, 3]), torch.zeros(3, 33), betas=(0.4, 0.9), decoupled=False)


def adamw_bits(op, module):
    ours, theirs = Tables(9, 33, torch.bfloat16), Tables(9, 33, torch.bfloat16)
    rows, grads = torch.tensor([8, 0, 3]), torch.ones(3, 33)
    ours.step(op, rows, grads, seed=3)
    theirs.step(adapter_kernels.row_adamw, rows, grads, seed=3)
    assert torch.equal(ours["table"], theirs["table"])


def lora(op, module):
    in_fences(lambda: check_lora(op, LoraCase(20, 300, 5, [140, 7])))


@pytest.mark.parametrize(
    ("op", "check", "before", "after"),
    [
        ("gather_rows", gather, "row * D, k.to(tl.int64) * D, k < n", "row * D, k.to(tl.int64) * D, k < n - 1"),
        ("gather_rows", gather, "inside = (row >= 0) & (row < r)", "inside = (row >= 0) & (row < r) & (k != 4)"),
        ("gather_rows", gather, "source2_ptr + source", "source_ptr + source"),
        ("gather_rows", gather, "k.to(tl.int64) * D, row * D, inside", "k.to(tl.int64) * D, row * D + 1, inside"),
        ("sparse_ffn", ffn, "(slot >= 0) & (score > 0)", "(slot >= 0) & (score > 0) & (m != 66)[:, None]"),
        ("sparse_ffn", ffn, "(slot >= 0) & (score > 0)", "score > 0"),
        ("sparse_ffn", ffn, "ds = ds * factor", "ds = ds"),
        ("sparse_ffn", ffn, "ds = tl.where(positive, ds, 0.0)", "ds = tl.where(slot >= 0, ds, 0.0)"),
        ("sparse_ffn", ffn, "inside = (m < M)", "inside = (m < M - 1)"),
        ("sparse_ffn", ffn, "range(0, K, BK):\n        k =", "range(0, K - BK, BK):\n        k ="),
        ("sparse_ffn", ffn, "total.to(out_ptr", "(total + 0.01 * (m == 65)[:, None]).to(out_ptr"),
        ("sparse_ffn", wide_ffn, "total.to(out_ptr", "total.to(b_ptr.dtype.element_ty).to(out_ptr"),
        ("sparse_ffn", token_ffn, "live & (score > 0)", "live & (score > 0) & (j != 3)"),
        ("sparse_ffn", token_ffn, "active[:, None] * tl.load", "tl.load"),
        ("row_adamw", adamw, "mask=inside, other=0) + 1", "mask=inside, other=0) + 2"),
        ("row_adamw", adamw, "p * decay", "p"),
        ("row_adamw", adam, "p * coupled", "m * coupled"),
        ("row_adamw", adam, "mix <= 0", "mix > 0"),
        ("row_adamw", adamw, "(item % blocks) * BN", "(item % blocks) * BN + 1"),
        ("row_adamw", adamw_bits, "(noise >> 15) ^ (key", "(noise >> 14) ^ (key"),
        ("row_adamw", adamw_bits, "0xBF58476D1CE4E5B9\n", "0\n    key = key + 1\n"),
        ("shared_lora", lora, "range(tl.program_id(1) * BK, D", "range(tl.program_id(1) * BK, D - BK"),
        ("shared_lora", lora, "+ m)[:, None] * R", "+ tl.maximum(m, 1))[:, None] * R"),
        ("shared_lora", lora, "range(pieces)", "range(pieces - 1)"),
        ("shared_lora", lora, "inside = (m < T)[:, None]", "inside = ((m < T) & (m != 19))[:, None]"),
    ],
    ids=itertools.count(),
)  # fmt: skip
def test_a_wrong_kernel_is_noticed(tmp_path, monkeypatch, op, check, before, after):
    with pytest.raises(AssertionError):
        check(*mutant(tmp_path, monkeypatch, op, before, after))


@pytest.mark.parametrize(
    ("op", "check"),
    [
        ("gather_rows", gather),
        ("sparse_ffn", ffn),
        ("sparse_ffn", wide_ffn),
        ("sparse_ffn", token_ffn),
        ("row_adamw", adamw),
        ("row_adamw", adam),
        ("row_adamw", adamw_bits),
        ("shared_lora", lora),
    ],
)
def test_the_right_one_passes(tmp_path, monkeypatch, op, check):
    check(*mutant(tmp_path, monkeypatch, op, "import torch\n", "import torch\n"))
