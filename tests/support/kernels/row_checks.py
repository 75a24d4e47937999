"""Checks of gather_rows and scatter_rows, for any implementation of them."""

from __future__ import annotations

import torch
from torch import Tensor

from adapter_kernels.rows import naive
from tests.support.kernels import kernel_checks

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(out: Tensor, oracle: Tensor) -> bool:
    """Also where there are NaN and signed zeros."""
    kind = BITS[out.element_size()]
    return out.dtype == oracle.dtype and torch.equal(out.view(kind), oracle.contiguous().view(kind))


def table(r: int, d: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random bits, so that all kinds of numbers are among the values; poison and fences around."""
    size = r * d * dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    fenced = kernel_checks.Fenced((r, d), dtype)
    if size:
        fenced.tensor.view(BITS[dtype.itemsize]).copy_(raw.view(BITS[dtype.itemsize]).view(r, d))
    return fenced.tensor


def check_gather(op, ids: Tensor, tables: list[Tensor]) -> None:
    """Every buffer bit by bit, and the tables as before."""
    before = [x.clone() for x in tables]
    out = op(ids, tables)
    assert len(out) == len(tables)
    for rows, one, old in zip(out, tables, before, strict=True):
        assert same_bits(rows, naive.gather_rows(ids, one))
        assert same_bits(one, old)


def check_scatter(op, ids: Tensor, rows: list[Tensor], shape: tuple[int, int]) -> None:
    """The whole of each table bit by bit, and the fence around it."""
    fenced = [kernel_checks.Fenced(shape, x.dtype) for x in rows]
    for one in fenced:
        one.tensor.zero_()
    oracles = [naive.scatter_rows(ids, x, one.tensor) for x, one in zip(rows, fenced, strict=True)]
    op(ids, rows, [one.tensor for one in fenced])
    for one, oracle in zip(fenced, oracles, strict=True):
        assert same_bits(one.tensor, oracle)
        assert one.intact(), "a kernel wrote outside of the table"
