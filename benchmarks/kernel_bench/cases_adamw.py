"""Cases of the op that steps rows: row_adamw."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adapter_kernels import RowState, StepRule
from benchmarks.kernel_bench.cases_rows import require_zero_copy
from benchmarks.kernel_bench.inputs import OURS, Bench, Case, Planned, close, find, require
from benchmarks.kernel_bench.timing import Contestant

FUSED, MOVED, ON_HOST = "fused AdamW, contiguous rows", "gather, fused AdamW, scatter", "D2H copy, step on the host"
STEP_DEVICE, STEP_PINNED = "on the device", "pinned, with a bf16 compute copy"
STEP: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


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
