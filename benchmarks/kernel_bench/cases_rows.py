"""Cases of the ops that move and step rows: gather_rows, scatter_rows, row_adamw."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adapter_kernels import RowState, StepRule
from benchmarks.kernel_bench.inputs import OURS, Bench, Case, MissingError, Planned, close, find, require, union_size
from benchmarks.kernel_bench.timing import Contestant

STAGED, EACH_ROW = "host index_select, one copy", "one copy a row"
TO_COMPACT, TO_TABLE = "device index_select, one D2H copy", "one D2H copy, host index_copy_"
FUSED, MOVED, ON_HOST = "fused AdamW, contiguous rows", "gather, fused AdamW, scatter", "D2H copy, step on the host"
PINNED, PINNED_TWO, ON_DEVICE = "pinned table", "two pinned tables", "device table"
STEP_DEVICE, STEP_PINNED = "on the device", "pinned, with a bf16 compute copy"
STEP: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


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


def adamw(bench: Bench) -> list[Planned]:
    """One step of the touched rows: on the device in fp32 and bf16, and in page-locked memory with a compute copy."""
    op, d = find("row_adamw"), bench.shapes.d
    rule = rule_of(STEP)

    def build(r: int, share: float, what: str, dtype: torch.dtype) -> Case:
        ids = bench.some_rows(r, share, seed=1)
        n = len(ids)
        table = bench.randn(r, d, seed=2, dtype=dtype)
        # Torch's fused AdamW has gradients of the table's dtype; over the link they come in half precision.
        grads = bench.randn(n, d, seed=3, dtype=dtype if what == STEP_DEVICE else bench.dtype)
        expected = expected_step(table.index_select(0, ids), grads)

        def verify(result: Tensor) -> None:
            close(result.to(bench.device), expected, "the stepped rows")

        def state(place: Callable[[Tensor], Tensor]) -> list[Tensor]:
            zeros = torch.zeros(r, d, device=bench.device)
            tensors = (table, zeros, zeros, torch.zeros(r, dtype=torch.int32, device=bench.device))
            return [place(tensor) for tensor in tensors]

        def ours(tensors: list[Tensor], compute_copy: Tensor | None, rows: Tensor, g: Tensor, impl: str) -> Tensor:
            op(RowState(*tensors, compute_copy), rows, g, rule, impl=impl)
            return tensors[0]

        def checked(at: Tensor) -> Callable[[Tensor], None]:
            return lambda whole: verify(whole.index_select(0, at))

        if what == STEP_DEVICE:
            held = state(Tensor.clone)
            contestants = {OURS: Contestant(lambda: ours(held, None, ids, grads, bench.impl), verify=checked(ids))}
            if dtype == torch.float32:
                contestants[FUSED] = Contestant(fused_step(table.index_select(0, ids), grads))
                contestants[MOVED] = Contestant(moved_step(table.clone(), ids, grads), verify=checked(ids))
            size = 2 * (dtype.itemsize + 8) + grads.element_size()
            return Case(contestants, verify, size * n * d, "device copy", 12 * n * d)
        require_zero_copy(bench)
        held, host = state(bench.pinned), state(partial(Tensor.to, device="cpu", copy=True))
        compute_copy = torch.empty(r, d, dtype=torch.bfloat16 if bench.dtype == torch.bfloat16 else torch.float16)
        compute_copies, rows = [bench.pinned(compute_copy), compute_copy], ids.cpu()

        def checked_with(compute_copy: Tensor) -> Callable[[Tensor], None]:
            def verify_both(whole: Tensor) -> None:
                verify(whole.index_select(0, rows))
                copied = compute_copy.index_select(0, rows)
                require(
                    torch.equal(copied, whole.index_select(0, rows).to(compute_copy.dtype)), "the compute copy differs"
                )

            return verify_both

        contestants = {
            OURS: Contestant(
                lambda: ours(held, compute_copies[0], ids, grads, bench.impl), verify=checked_with(compute_copies[0])
            ),
            ON_HOST: Contestant(
                lambda: ours(host, compute_copies[1], ids.cpu(), grads.cpu(), "torch"),
                waits=True,
                verify=checked_with(compute_copies[1]),
            ),
        }
        # In come the table and both moments, out go these and the compute copy: the larger of the two.
        return Case(contestants, verify, (12 + 2) * n * d, "pinned copies at once", 12 * n * d)

    kinds = [(STEP_DEVICE, torch.float32), (STEP_PINNED, torch.float32)]
    if bench.dtype == torch.bfloat16:
        kinds.append((STEP_DEVICE, torch.bfloat16))
    return [
        Planned(
            what,
            {"r": r, "share": share, "dtype": str(dtype).removeprefix("torch.")},
            partial(build, r, share, what, dtype),
        )
        for what, dtype in kinds
        for r, share in bench.shapes.tables()
    ]


def rule_of(settings: dict[str, Any], decoupled: bool = True) -> StepRule:
    """The rule of a step with settings as torch's optimizers take them."""
    beta1, beta2 = settings["betas"]
    return StepRule(settings["lr"], beta1, beta2, settings["eps"], settings["weight_decay"], decoupled)


def expected_step(rows: Tensor, grads: Tensor) -> Tensor:
    """The first step of each row, by the package's reference in float64."""
    from adapter_kernels.adamw import naive

    p, g = rows.double(), grads.double()
    zeros = torch.zeros_like(p)
    return naive.row_adamw(p, zeros, zeros, 1, g, STEP["lr"], STEP["betas"], STEP["eps"], STEP["weight_decay"])[0]


def fused_step(rows: Tensor, grads: Tensor) -> Callable[[], Tensor]:
    """Torch's fused AdamW on rows that lie together."""
    parameter = torch.nn.Parameter(rows)
    parameter.grad = grads
    optimizer = torch.optim.AdamW([parameter], fused=True, **STEP)

    def call() -> Tensor:
        optimizer.step()
        return parameter.detach()

    return call


def moved_step(table: Tensor, ids: Tensor, grads: Tensor) -> Callable[[], Tensor]:
    """The same between a gather and a scatter of the rows and their moments."""
    compact = torch.nn.Parameter(table.index_select(0, ids))
    compact.grad = grads
    optimizer = torch.optim.AdamW([compact], fused=True, **STEP)
    wholes = {"exp_avg": torch.zeros_like(table), "exp_avg_sq": torch.zeros_like(table)}
    places = ids.long()

    def call() -> Tensor:
        state = optimizer.state[compact]
        pairs = [(compact.data, table)] + [(state[name], whole) for name, whole in wholes.items() if name in state]
        for rows, whole in pairs:
            torch.index_select(whole, 0, places, out=rows)
        optimizer.step()
        state = optimizer.state[compact]
        for rows, whole in [(compact.data, table)] + [(state[name], whole) for name, whole in wholes.items()]:
            whole.index_copy_(0, places, rows)
        return table

    return call


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


def gate_adamw(bench: Bench) -> None:
    """A later step of few rows on the device and in host memory, beside the package's own reference in float64."""
    from adapter_kernels.adamw import naive

    op, (r, d) = find("row_adamw"), (37, 72)
    ids = torch.tensor([30, 2, 36, 0], dtype=torch.int32, device=bench.device)
    rows, rule = ids.cpu().long(), (STEP["lr"], STEP["betas"], STEP["eps"], STEP["weight_decay"])
    start = [bench.randn(r, d, seed=seed, dtype=torch.float32).cpu() for seed in (1, 2, 3)]
    start[2].square_()
    touches, grads = torch.arange(r, dtype=torch.int32), bench.randn(len(ids), d, seed=4)
    near, far = partial(Tensor.to, device=bench.device, copy=True), bench.pinned
    single = torch.float32
    for place, dtype, decoupled in (
        (near, single, True), (near, single, False), (near, torch.bfloat16, True), (far, single, True)
    ):  # fmt: skip
        if place is far:
            require_zero_copy(bench)
        table, *moments, count = (place(x) for x in (start[0].to(dtype), *start[1:], touches))
        before = start[0].to(dtype)
        op(RowState(table, *moments, count), ids, grads, rule_of(STEP, decoupled), impl=bench.impl)
        bench.clock.wait()
        found = [x.cpu()[rows] for x in (table, *moments)]
        for i, row in enumerate(rows.tolist()):
            state = (before[row].double(), *(x[row].double() for x in start[1:]))
            expected = naive.row_adamw(*state, row + 1, grads[i].cpu().double(), *rule, decoupled)
            for name, ours, theirs in zip(("table", "exp_avg", "exp_avg_sq"), found, expected, strict=True):
                # Stochastic rounding goes to either neighbour.
                limit = 2e-2 if ours.dtype == torch.bfloat16 else 2e-6
                close(ours[i], theirs, f"row_adamw: {name}", limit)
        others = torch.ones(r, dtype=torch.bool)
        others[rows] = False
        require(torch.equal(table.cpu()[others], before[others]), "row_adamw: another row has changed")
        require(torch.equal(count.cpu(), touches + (~others).int()), "row_adamw: the counts differ")
