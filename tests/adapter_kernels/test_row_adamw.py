"""row_adamw on the CPU: the torch path against the oracle, torch's AdamW and meft's bits; registration, errors."""

import pytest
import torch

from adapter_kernels import RowState, StepRule, debugging, row_adamw
from adapter_kernels.adamw.row_adamw import _op
from meft.table.row_step import native_library, update_rows
from tests.support.kernels.adamw_checks import RULE, Tables, check_adamw
from tests.support.kernels.row_checks import same_bits
from tests.support.kernels.selection_checks import generator


@pytest.mark.parametrize("table", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.4, 0.9)])
@pytest.mark.parametrize("decoupled", [True, False])
def test_a_step(table, betas, decoupled):
    tables = Tables(200, 1000, table, compute_dtype=torch.bfloat16 if table == torch.float32 else None)
    rows = torch.randperm(200, generator=generator(1))[:150]
    grads = torch.randn(150, 1000, generator=generator(2))
    check_adamw(row_adamw, tables, rows, grads, betas=betas, decoupled=decoupled)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adam])
def test_all_rows_step_as_in_torch(optimizer):
    decoupled = optimizer is torch.optim.AdamW
    tables = Tables(5, 40)
    for name in ("exp_avg", "exp_avg_sq", "counts"):
        tables[name].zero_()
    parameter = torch.nn.Parameter(tables["table"].clone())
    optimizer = optimizer([parameter], **RULE)
    for step in range(4):
        parameter.grad = torch.randn(5, 40, generator=generator(step))
        optimizer.step()
        tables.step(row_adamw, torch.arange(5), parameter.grad, decoupled=decoupled)
    torch.testing.assert_close(tables["table"], parameter.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(native_library() is None, reason="without it meft takes row_adamw itself")
@pytest.mark.parametrize("decoupled", [True, False])
def test_same_bits_as_meft_in_cpp(decoupled):
    table, compute_dtype = torch.float32, torch.bfloat16
    ours, theirs = (
        Tables(9, 300, table, compute_dtype=compute_dtype),
        Tables(9, 300, table, compute_dtype=compute_dtype),
    )
    rule = StepRule(RULE["lr"], 0.9, 0.99, RULE["eps"], RULE["weight_decay"], decoupled)
    for step in range(3):
        rows = torch.randperm(9, generator=generator(step))[:6].sort().values
        grads = torch.randn(6, 300, generator=generator(step))
        ours.step(row_adamw, rows, grads, betas=(0.9, 0.99), seed=7, decoupled=decoupled)
        update_rows(theirs.state, rows, grads, rule, seed=7, native=True)
    for name in ours.fenced:
        assert same_bits(ours[name], theirs[name]), name


def test_stochastic_rounding_keeps_the_mean():
    mean = torch.zeros(8, 512)
    for seed in range(50):
        table, nothing = torch.full((8, 512), 1 + 2.0**-9, dtype=torch.bfloat16), torch.zeros(8, 512)
        state = RowState(table, nothing.clone(), nothing.clone(), torch.zeros(8, dtype=torch.int32))
        # A step of lr, as large as a quarter of a unit in the last place.
        row_adamw(state, torch.arange(8), torch.ones(8, 512), StepRule(2.0**-9, eps=0.0), seed=seed)
        mean += table.float() / 50
    assert abs(mean.mean().item() - (1 - 2.0**-9)) < 4e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration(dtype):
    tables = Tables(5, 8, dtype, compute_dtype=torch.float16 if dtype == torch.float32 else None)
    rows, grads = torch.tensor([3, 1]), torch.ones(2, 8)
    copies = [x.clone() if x is not None else None for x in tables.state]
    torch.library.opcheck(_op, (*copies, rows, grads, 1e-2, 0.9, 0.999, 1e-8, 0.1, True, 0, None))
    compiled = torch.compile(row_adamw, fullgraph=True, backend="aot_eager")
    other = Tables(5, 8, dtype, compute_dtype=torch.float16 if dtype == torch.float32 else None)
    tables.step(compiled, rows, grads)
    other.step(row_adamw, rows, grads)
    for name in tables.fenced:
        assert same_bits(tables[name], other[name])


def test_a_float64_table_with_a_float32_compute_copy():
    tables = Tables(9, 40, torch.float64, compute_dtype=torch.float32)
    check_adamw(row_adamw, tables, torch.tensor([8, 0, 3]), torch.ones(3, 40, dtype=torch.float64))


T = torch.ones(4, 8)
GOOD = {
    "state": RowState(T, T, T, torch.zeros(4, dtype=torch.int32)),
    "rows": torch.tensor([1, 2]),
    "grads": T[:2],
    "rule": StepRule(0.1),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": T.half()}, "table: one of"),
        ({"table": T[0]}, "table: two dimensions"),
        ({"exp_avg": T.bfloat16()}, "exp_avg: one of"),
        ({"exp_avg_sq": T[:2]}, r"exp_avg_sq: the shape \(4, 8\) is needed, not \(2, 8\)"),
        ({"compute_copy": T}, "compute_copy: one of"),
        ({"table": T.bfloat16(), "compute_copy": T.half()}, "compute_copy: a bfloat16 table has none"),
        ({"counts": torch.zeros(4)}, "counts: one of torch.int32 is needed, not torch.float32"),
        ({"rows": torch.ones(2)}, "rows: int32 or int64"),
        ({"grads": T[:2, :7]}, "grads: 8 columns are needed"),
        ({"grads": T[:3]}, "grads: 3 rows for 2 ids"),
        ({"rule": StepRule(0.1, beta2=1.0)}, "betas: from 0 to below 1"),
        ({"rule": StepRule(-1.0)}, "lr, eps and weight_decay: "),
        ({"table": torch.ones(8, 4).T}, "table: a contiguous tensor"),
        ({"exp_avg": T.to("meta")}, "exp_avg: is on meta, but table is on cpu"),
        ({"rows": torch.ones(2, dtype=torch.int64, device="meta")}, "grads: is on cpu, but rows is on meta"),
        ({"rows": torch.tensor([1, 4])}, "rows: 0 to 3 are possible, not 1 to 4"),
    ],
)
def test_bad_input(change, message):
    state = GOOD["state"]._replace(**{name: x for name, x in change.items() if name in RowState._fields})
    others = {name: x for name, x in change.items() if name not in RowState._fields}
    with pytest.raises(ValueError, match=message):
        row_adamw(**(GOOD | {"state": state} | others))


def test_rows_are_looked_at_in_debug_mode():
    with debugging(), pytest.raises(ValueError, match="rows: a row is there twice"):
        row_adamw(**(GOOD | {"rows": torch.tensor([1, 1])}))
