"""row_adamw's kernels: against the oracle, and bit by bit against the torch path."""

from functools import partial

import pytest
import torch

from adapter_kernels import override, row_adamw
from meft.table import row_step as row_update
from tests.support.kernels.adamw_checks import Tables, check_adamw
from tests.support.kernels.row_checks import same_bits
from tests.support.kernels.selection_checks import generator

kernel = partial(row_adamw, impl="triton")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def long_tiles():
    """The interpreter's cost is by the operation, not by its size."""
    with override("row_adamw.step", BN=8192):
        yield


@pytest.mark.parametrize("grads", DTYPES)
@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "d", "betas", "decoupled"),
    [
        (1, 4100, (0.9, 0.999), True),
        (13, 576, (0.9, 0.95), False),
        (5, 33, (0.4, 0.9), True),
        (2, 4096, (0.0, 0.9), True),
    ],
)
def test_a_step(fenced, grads, table, n, d, betas, decoupled):
    narrow = torch.bfloat16 if grads == torch.float32 else grads
    tables = Tables(20, d, table, compute_dtype=narrow if table == torch.float32 else None)
    rows = torch.randperm(20, generator=generator(1))[:n]
    check_adamw(
        kernel, tables, rows, torch.randn(n, d, generator=generator(2)).to(grads), betas=betas, decoupled=decoupled
    )


def test_many_rows(fenced):
    rows = torch.randperm(600, generator=generator(1))[:512]
    with override("row_adamw.prepare", BLOCK=512):
        check_adamw(kernel, Tables(600, 8), rows, torch.randn(512, 8, generator=generator(2)))


@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("beta1", "decoupled"), [(0.9, True), (0.9, False), (0.5, True)])
def test_same_bits_as_the_torch_path(fenced, table, beta1, decoupled):
    compute_dtype = torch.float16 if table == torch.float32 else None
    ours, theirs = (
        Tables(9, 300, table, compute_dtype=compute_dtype),
        Tables(9, 300, table, compute_dtype=compute_dtype),
    )
    for step in range(3):
        rows = torch.randperm(9, generator=generator(step))[:6].to(torch.int32)
        grads = torch.randn(6, 300, generator=generator(step))
        grads[0, :3] = torch.tensor([torch.inf, torch.nan, 0.0])
        ours.step(kernel, rows, grads, betas=(beta1, 0.99), seed=7, decoupled=decoupled)
        theirs.step(row_adamw, rows, grads, betas=(beta1, 0.99), seed=7, decoupled=decoupled)
    for name in ours.fenced:
        left, right = ours[name], theirs[name]
        if left.is_floating_point():  # a NaN's own bits are free
            left, right = left.nan_to_num(nan=7.0), right.nan_to_num(nan=7.0)
        assert torch.equal(left, right), name


@pytest.mark.parametrize("decoupled", [True, False])
def test_meft_steps_rows_with_it_to_the_same_bits(fenced, monkeypatch, decoupled):
    """As `update_rows` does where the table is on a GPU."""
    ours, theirs = Tables(9, 300, compute_dtype=torch.bfloat16), Tables(9, 300, compute_dtype=torch.bfloat16)
    rule = row_update.StepRule(1e-2, 0.9, 0.99, 1e-8, 0.1, decoupled)
    for step in range(2):
        rows = torch.randperm(9, generator=generator(step))[:6].sort().values
        grads = torch.randn(300, 6, generator=generator(step)).T
        for tables, op in ((ours, kernel), (theirs, row_adamw)):
            monkeypatch.setattr(row_update, "row_adamw", op)
            row_update.update_rows(tables.state, rows, grads, rule, native=False if op is kernel else None)
    for name in ours.fenced:
        assert same_bits(ours[name], theirs[name]), name


def test_tiles_as_they_are_launched(fenced):
    with override("row_adamw.step", BN=1024, DEVICE_PROGRAMS=5), override("row_adamw.prepare", BLOCK=2):
        check_adamw(kernel, Tables(9, 1500), torch.tensor([8, 0, 3]), torch.ones(3, 1500))


def test_none_all_and_rows_that_are_not_there(fenced):
    check_adamw(kernel, Tables(4, 16), torch.empty(0, dtype=torch.int64), torch.empty(0, 16))
    check_adamw(kernel, Tables(4, 16), torch.arange(3, -1, -1), torch.ones(4, 16))
    ours, theirs = Tables(4, 16), Tables(4, 16)
    ours.step(kernel, torch.tensor([-1, 2, 4]), torch.ones(3, 16))
    theirs.step(kernel, torch.tensor([2]), torch.ones(1, 16))
    for name, fenced_table in ours.fenced.items():
        assert fenced_table.intact()
        assert same_bits(ours[name], theirs[name])
