"""gather_rows and scatter_rows on the CPU: the torch path, registration, host memory, errors."""

import logging
import sys

import pytest
import torch

from adapter_kernels import debugging, gather_rows, scatter_rows
from adapter_kernels.rows import gather_rows_torch, gather_rows_triton
from adapter_kernels.rows.gather_rows import _gather_op, _host_memory_reachable, _scatter_op, zero_copy
from tests.support.kernels.row_checks import check_gather, check_scatter, same_bits, table
from tests.support.kernels.selection_checks import generator

MODULE = sys.modules["adapter_kernels.rows.gather_rows"]  # the package has the function of that name
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tables", [1, 2])
@pytest.mark.parametrize("lowest", [-1, 0])
def test_copies_bit_by_bit(dtype, tables, lowest):
    ids = torch.randint(lowest, 50, (37,), generator=generator(), dtype=torch.int32)
    check_gather(gather_rows, ids, [table(50, 100, dtype, seed) for seed in range(tables)])
    ids = torch.randperm(50, generator=generator())[:20]
    ids[:1] += lowest * (1 + ids[:1])
    check_scatter(scatter_rows, ids, [table(20, 100, dtype, seed) for seed in range(tables)], (50, 100))


def test_none():
    nothing = torch.empty(0, dtype=torch.int32)
    assert gather_rows(nothing, [torch.ones(3, 4)])[0].shape == (0, 4)
    assert torch.equal(gather_rows(torch.tensor([-1]), [torch.ones(0, 4)])[0], torch.zeros(1, 4))
    one = torch.ones(3, 4)
    scatter_rows(nothing, [torch.empty(0, 4)], [one])
    assert torch.equal(one, torch.ones(3, 4))


def test_new_buffers_carry_no_gradient():
    assert not gather_rows(torch.tensor([1]), [torch.ones(3, 4, requires_grad=True)])[0].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration(dtype):
    ids, one = torch.tensor([2, -1, 0]), torch.randn(4, 8, generator=generator()).to(dtype)
    torch.library.opcheck(_gather_op, (ids, [one, one + 1], [torch.zeros(3, 8).to(dtype) for _ in range(2)], None))
    torch.library.opcheck(_scatter_op, (ids, [torch.ones(3, 8).to(dtype)], [one.clone()], None))

    def move(ids, source, target):
        rows = gather_rows(ids, [source])
        scatter_rows(ids, [rows[0] * 2], [target])
        return rows[0] + 1

    targets = [torch.zeros_like(one) for _ in range(2)]
    compiled = torch.compile(move, fullgraph=True, backend="aot_eager")(ids, one, targets[0])
    assert torch.equal(compiled, move(ids, one, targets[1]))
    assert torch.equal(*targets)


ONE = torch.ones(3, 4)
IDS = torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("ids", "tables", "out", "message"),
    [
        (IDS[None], [ONE], None, "ids: one dimension"),
        (IDS.float(), [ONE], None, "ids: int32 or int64"),
        (torch.arange(4)[::2], [ONE], None, "ids: contiguous"),
        (IDS, [], None, "tables: one or two"),
        (IDS, [ONE] * 3, None, "tables: one or two"),
        (IDS, [ONE[0]], None, r"tables\[0\]: two dimensions"),
        (IDS, [ONE.int()], None, r"tables\[0\]: one of"),
        (IDS, [ONE.T.contiguous().T], None, r"tables\[0\]: a contiguous table"),
        (IDS, [ONE, ONE.half()], None, r"tables\[1\]: another shape or dtype"),
        (IDS, [ONE, ONE[:2]], None, r"tables\[1\]: another shape or dtype"),
        (IDS, [ONE.to("meta")], [ONE[:2]], r"tables\[0\]: is on meta, but the ids are on cpu"),
        (IDS, [ONE], [ONE], r"out\[0\]: contiguous torch.float32 \(2, 4\)"),
        (IDS, [ONE], [ONE[:2].to("meta")], r"out\[0\]: is on meta"),
        (IDS, [ONE], [ONE[:2], ONE[:2]], "out: 2 buffers for 1 tables"),
        (torch.tensor([3]), [ONE], None, "ids: -1 to 2 are possible, not 3"),
        (torch.tensor([-2]), [ONE], None, "ids: -1 to 2 are possible, not -2"),
    ],
)
def test_bad_input(ids, tables, out, message):
    with pytest.raises(ValueError, match=message):
        gather_rows(ids, tables, out=out)


def test_bad_rows():
    with pytest.raises(ValueError, match=r"rows\[0\]: contiguous torch.float32 \(2, 4\)"):
        scatter_rows(IDS, [ONE], [ONE.clone()])
    with debugging(), pytest.raises(ValueError, match="ids: a row is written twice"):
        scatter_rows(torch.tensor([1, 1]), [ONE[:2]], [ONE.clone()])


@pytest.mark.parametrize("error", [RuntimeError("no"), ValueError("Pointer argument cannot be accessed from Triton")])
def test_a_probe_that_fails_leads_to_staging(monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    monkeypatch.setattr(gather_rows_triton, "copy_rows", fail)
    monkeypatch.setattr(MODULE.jit, "AVAILABLE", True)
    assert not _host_memory_reachable.__wrapped__(torch.device("cpu"))


def test_without_triton_rows_are_staged(monkeypatch, caplog):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    monkeypatch.setattr(MODULE.jit, "AVAILABLE", False)
    assert not _host_memory_reachable.__wrapped__(torch.device("cpu"))
    assert "triton is not installed" in caplog.text


def test_pageable_memory_is_refused_and_page_locked_memory_is_tried(monkeypatch):
    cuda = torch.device("cuda", 0)
    with pytest.raises(ValueError, match="master: is in pageable host memory"):
        zero_copy(cuda, master=ONE)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    for reachable in (True, False):
        monkeypatch.setattr(MODULE, "_host_memory_reachable", lambda _, answer=reachable: answer)
        assert zero_copy(cuda, master=ONE) is reachable
    assert zero_copy(torch.device("cpu"), master=ONE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_a_device_that_cannot_reach_host_memory_is_named_once(caplog):
    _host_memory_reachable.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not _host_memory_reachable(torch.device("cuda", 0))
        assert not _host_memory_reachable(torch.device("cuda", 0))
    assert [record.message.startswith("cuda:0 cannot reach host memory") for record in caplog.records] == [True]
    _host_memory_reachable.cache_clear()


class Elsewhere(torch.Tensor):
    """Ids that say they are on a GPU."""

    @property
    def device(self):
        return torch.device("cuda", 0)

    def to(self, *_):
        return self.as_subclass(torch.Tensor)


def test_staged_rows():
    ids, one = torch.tensor([2, -1]), table(3, 8, torch.bfloat16)
    out = torch.empty(2, 8, dtype=torch.bfloat16)
    gather_rows_torch.gather(ids.as_subclass(Elsewhere), one, out)
    assert same_bits(out, torch.cat([one[2:], torch.zeros(1, 8, dtype=torch.bfloat16)]))
    target = torch.zeros_like(one)
    gather_rows_torch.scatter(ids.as_subclass(Elsewhere), out, target)
    assert same_bits(target, torch.cat([torch.zeros_like(one[:2]), one[2:]]))
