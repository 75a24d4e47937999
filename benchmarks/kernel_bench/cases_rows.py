"""Cases of the ops that move rows: gather_rows, scatter_rows."""

import importlib
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernel_bench.inputs import OURS, Bench, Case, MissingError, Planned, find, require, union_size
from benchmarks.kernel_bench.timing import Contestant

STAGED, EACH_ROW = "host index_select, one copy", "one copy a row"
TO_COMPACT, TO_TABLE = "device index_select, one D2H copy", "one D2H copy, host index_copy_"
PINNED, PINNED_TWO, ON_DEVICE = "pinned table", "two pinned tables", "device table"


def require_zero_copy(bench: Bench) -> None:
    """`MissingError` where the device cannot reach page-locked memory: the op would be its own rival there."""
    if bench.rehearsal:
        return
    module = importlib.import_module("adapter_kernels.rows.gather_rows")
    if not module.zero_copy(bench.device, table=bench.pinned(torch.zeros(1, 64))):
        raise MissingError("kernels cannot read page-locked host memory here")


def gather(bench: Bench) -> list[Planned]:
    """Rows out of page-locked memory and out of the device's own."""
    op, d = find("gather_rows"), bench.shapes.d

    def build(r: int, share: float, what: str) -> Case:
        ids = bench.some_rows(r, share, seed=1)
        values = bench.randn(r, d, seed=2)
        n = len(ids)
        size = n * d * values.element_size()
        out = [
            torch.empty(n, d, dtype=values.dtype, device=bench.device) for _ in range(2 if what == PINNED_TWO else 1)
        ]
        expected = values.index_select(0, ids)

        def verify(result: list[Tensor]) -> None:
            require(all(torch.equal(found, expected) for found in result), "the rows are not the table's")

        if what == ON_DEVICE:
            own = torch.empty_like(out[0])
            contestants = {
                OURS: Contestant(lambda: op(ids, [values], out=out, impl=bench.impl)),
                "torch.index_select": Contestant(lambda: [torch.index_select(values, 0, ids, out=own)]),
            }
            return Case(contestants, verify, 2 * size, "device copy")
        require_zero_copy(bench)
        tables = [bench.pinned(values) for _ in out]
        stages = [bench.pinned(torch.empty(n, d, dtype=values.dtype)) for _ in out]

        def staged() -> list[Tensor]:
            rows = ids.cpu()
            for table, stage, target in zip(tables, stages, out, strict=True):
                torch.index_select(table, 0, rows, out=stage)
                target.copy_(stage, non_blocking=True)
            return out

        def each_row() -> list[Tensor]:
            for table, target in zip(tables, out, strict=True):
                for k, row in enumerate(ids.tolist()):
                    target[k].copy_(table[row], non_blocking=True)
            return out

        contestants = {
            OURS: Contestant(lambda: op(ids, tables, out=out, impl=bench.impl)),
            STAGED: Contestant(staged, waits=True),
        }
        if (r, share) == (bench.shapes.main[0], bench.shapes.main[2]):  # slow, so once
            contestants[EACH_ROW] = Contestant(each_row, waits=True)
        return Case(contestants, verify, len(out) * size, "pinned copy in")

    return [
        Planned(what, {"r": r, "share": share}, partial(build, r, share, what))
        for what in (PINNED, PINNED_TWO, ON_DEVICE)
        for r, share in bench.shapes.tables()
    ]


def scatter(bench: Bench) -> list[Planned]:
    """Rows into page-locked memory."""
    op, d = find("scatter_rows"), bench.shapes.d

    def build(r: int, share: float) -> Case:
        require_zero_copy(bench)
        ids, rows = bench.some_rows(r, share, seed=1), bench.randn(union_size(r, share), d, seed=2)
        others = torch.ones(r, dtype=torch.bool).index_fill_(0, ids.cpu().long(), False)
        tables = [bench.pinned(torch.full((r, d), 7.0, dtype=rows.dtype)) for _ in range(2)]
        stage = bench.pinned(torch.empty_like(rows, device="cpu"))
        order = torch.randperm(len(rows), generator=bench.generator(3), device=bench.device)

        def zero_copy() -> Tensor:
            op(ids, [rows], [tables[0]], impl=bench.impl)
            return tables[0]

        def to_table() -> Tensor:
            stage.copy_(rows, non_blocking=True)
            places = ids.cpu().long()  # waits for both copies
            return tables[1].index_copy_(0, places, stage)

        def to_compact() -> Tensor:
            return stage.copy_(rows.index_select(0, order), non_blocking=True)

        def verify(table: Tensor) -> None:
            require(
                torch.equal(table.index_select(0, ids.cpu()).to(rows.device), rows), "rows are not where they belong"
            )
            require(bool((table[others] == 7.0).all()), "a row that was not named has changed")

        def verify_compact(result: Tensor) -> None:
            require(torch.equal(result.to(rows.device), rows[order]), "the copied rows differ")

        contestants = {
            OURS: Contestant(zero_copy),
            TO_COMPACT: Contestant(to_compact, verify=verify_compact),
            TO_TABLE: Contestant(to_table, waits=True),
        }
        return Case(contestants, verify, rows.numel() * rows.element_size(), "pinned copy out")

    return [Planned(PINNED, {"r": r, "share": share}, partial(build, r, share)) for r, share in bench.shapes.tables()]


def gate_rows(bench: Bench) -> None:
    """Copies of few rows, beside the package's own naive."""
    from adapter_kernels.rows import naive

    gather_op, scatter_op = find("gather_rows"), find("scatter_rows")
    table, rows = bench.randn(37, 72, seed=1), bench.randn(5, 72, seed=2)
    ids = torch.tensor([30, 2, 36, -1, 0], dtype=torch.int32, device=bench.device)
    for source in (table, bench.pinned(table)):
        found = gather_op(ids, [source], impl=bench.impl)[0].cpu()
        require(torch.equal(found, naive.gather_rows(ids.cpu(), table.cpu())), "gather_rows: the rows differ")
        expected = naive.scatter_rows(ids.cpu(), rows.cpu(), table.cpu())
        target = source.clone() if source.device == bench.device else bench.pinned(source)
        scatter_op(ids, [rows], [target], impl=bench.impl)
        bench.clock.wait()
        require(torch.equal(target.cpu(), expected), "scatter_rows: the table differs")
