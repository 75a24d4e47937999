"""Rows of the kernel benchmark: the machine's ceilings and each op's cases; what fails is a row that says so."""

import time
from collections.abc import Callable
from statistics import median

import torch

from benchmarks.kernel_bench.cases_rows import gate_rows, require_zero_copy
from benchmarks.kernel_bench.inputs import OURS, Bench, Case, MissingError, Planned, Shape, WrongError, find, union_size
from benchmarks.kernel_bench.targets import BESIDE, OK, Row
from benchmarks.kernel_bench.timing import Contestant, Sample, at_once, quantiles, side_by_side

SECONDS = 0.4  # of the rounds of one case, beyond the fewest

Plan = Callable[[Bench], list[Planned]]
Gate = Callable[[Bench], None]


def measure_ceilings(bench: Bench) -> list[Row]:
    """What the machine can do: pinned copies each way and both at once, a copy on the device, a bf16 GEMM."""
    shapes, device = bench.shapes, bench.device
    host = [bench.pinned(torch.zeros(shapes.copied, dtype=torch.int8)) for _ in range(2)]
    near = [torch.zeros(shapes.copied, dtype=torch.int8, device=device) for _ in range(2)]
    large = [torch.zeros(shapes.device_copied, dtype=torch.int8, device=device) for _ in range(2)]
    a, b = (bench.randn(shapes.gemm, shapes.gemm, seed=seed) for seed in (1, 2))
    product = torch.empty_like(a)

    def copy_in() -> None:
        near[0].copy_(host[0], non_blocking=True)

    def copy_out() -> None:
        host[1].copy_(near[1], non_blocking=True)

    both = copy_out if bench.rehearsal else at_once(copy_in, copy_out)
    # Work of each: bytes of one direction; read and written on the device; flops.
    work: dict[str, tuple[Callable[[], object], int]] = {
        "pinned copy in": (copy_in, shapes.copied),
        "pinned copy out": (copy_out, shapes.copied),
        "pinned copies at once": (both, shapes.copied),
        "device copy": (lambda: large[1].copy_(large[0]), 2 * shapes.device_copied),
        "GEMM": (lambda: torch.mm(a, b, out=product), 2 * shapes.gemm**3),
    }
    rows = []
    for name, (call, amount) in work.items():
        samples = bench.clock.rounds({name: Contestant(call)}, SECONDS, float("inf"))[name]
        rate = amount / median(sample.ms for sample in samples) * 1e3
        bench.ceilings[name] = rate
        kind = {"flops": amount, "bytes": 0} if name == "GEMM" else {"bytes": amount, "flops": 0}
        row = base_row(bench, "ceiling", name, {}, "torch") | timing(samples) | kind
        rows.append(row | {"rate": rate, "of_ceiling": ""})
    return rows


def base_row(bench: Bench, op: str, what: str, shape: Shape, contestant: str) -> Row:
    """The columns that say what a row is of."""
    dtype = str(bench.dtype).removeprefix("torch.")
    row: Row = {"op": op, "what": what, "contestant": contestant, "dtype": dtype, "d": bench.shapes.d} | shape
    if "share" in shape:
        row["U"] = union_size(int(shape["r"]), float(shape["share"]))
    return row


def timing(samples: list[Sample]) -> Row:
    """The columns of a measured row."""
    low, middle, high = quantiles([sample.ms for sample in samples])
    return {
        "status": OK, "ms_q20": low, "ms_q50": middle, "ms_q80": high, "rounds": len(samples),
        "host_ms": median(sample.host_ms for sample in samples),
        "host_gaps": sum(sample.gap for sample in samples) / len(samples),
    }  # fmt: skip


def failure(error: Exception) -> str:
    """A row's status where there is no time."""
    if isinstance(error, WrongError):
        return f"wrong: {error}"
    if isinstance(error, MissingError):
        return f"missing: {error}"
    first = next(iter(str(error).splitlines()), "")
    return f"error: {type(error).__name__}: {first[:200]}"


def verified(bench: Bench, case: Case) -> tuple[dict[str, Contestant], dict[str, str]]:
    """The contestants whose result is right, and why the others have no time."""
    right, reasons = {}, {}
    for name, contestant in case.contestants.items():
        try:
            result = contestant.call()
            bench.clock.wait()
            (contestant.verify or case.verify)(result)
            right[name] = contestant
        except Exception as error:  # one contestant's failure is a row, not the end of the run
            reasons[name] = failure(error)
    return right, reasons


def measure(bench: Bench, op: str, planned: Planned, deadline: float) -> list[Row]:
    """The rows of one case. Where ours is wrong, none is timed: there is nothing to compare with."""
    case = planned.build()
    right, reasons = verified(bench, case)
    ours = next(iter(case.contestants))
    samples = bench.clock.rounds(right, SECONDS, deadline) if ours in right else {}
    rows = []
    for name in case.contestants:
        row = base_row(bench, op, planned.what, planned.shape, name)
        if name in reasons:
            row["status"] = reasons[name]
        elif not samples.get(name):
            row["status"] = "not run: out of time" if ours in right else f"not run: {ours} failed"
        else:
            row |= timing(samples[name])
            per_ms = case.flops if case.bound == "GEMM" else case.bytes
            row |= {"bytes": case.bytes, "flops": case.flops, "ceiling": case.bound}
            if case.contestants[name].same_work:
                row["rate"] = rate = per_ms / median(sample.ms for sample in samples[name]) * 1e3
                row["of_ceiling"] = rate / bench.ceilings[case.bound]
            row["times_ours"] = median(a.ms / b.ms for a, b in zip(samples[name], samples[ours], strict=True))
        rows.append(row)
    return rows


def run_op(
    bench: Bench, op: str, make_plan: Plan, gate: Gate, deadline: float, passed: set[Gate] | None = None
) -> list[Row]:
    """All rows of one op; a gate that has been passed, which ops may share, is not tried again."""
    passed = set() if passed is None else passed
    try:
        plan = make_plan(bench)
    except MissingError as error:
        return [base_row(bench, op, "", {}, OURS) | {"status": failure(error)}]
    refused = ""
    try:
        if gate not in passed:
            gate(bench)
            passed.add(gate)
    except Exception as error:  # nothing of this op is timed
        refused = failure(error)
    rows: list[Row] = []
    for planned in plan:
        reason = refused or ("not run: out of time" if time.perf_counter() > deadline else "")
        if not reason:
            try:
                rows += measure(bench, op, planned, deadline)
                continue
            except Exception as error:
                reason = failure(error)
        rows.append(base_row(bench, op, planned.what, planned.shape, OURS) | {"status": reason})
    return rows


def beside_a_gemm(bench: Bench) -> list[Row]:
    """The gather of the main shape while a bf16 GEMM runs on another stream, and that GEMM beside it and alone."""
    r, _, share = bench.shapes.main
    shape: Shape = {"r": r, "share": share}
    rows = [base_row(bench, BESIDE, what, shape, OURS) for what in ("gather", "GEMM", "GEMM alone")]
    try:
        if bench.rehearsal:
            raise MissingError("two streams of a CUDA device are needed")
        require_zero_copy(bench)
        gate_rows(bench)
        op, size = find("gather_rows"), bench.shapes.gemm // 2
        ids, values = bench.some_rows(r, share, seed=1), bench.randn(r, bench.shapes.d, seed=2)
        compute_copy, out = (
            bench.pinned(values),
            [torch.empty(len(ids), bench.shapes.d, dtype=bench.dtype, device=bench.device)],
        )
        a, b = (bench.randn(size, size, seed=seed) for seed in (3, 4))
        product = torch.empty_like(a)

        def gather_once() -> None:
            op(ids, [compute_copy], out=out, impl=bench.impl)

        def multiply() -> None:
            torch.mm(a, b, out=product)

        samples = bench.clock.rounds({"a": Contestant(gather_once), "b": Contestant(multiply)}, 0.1, float("inf"))
        times = [median(sample.ms for sample in samples[name]) for name in "ab"]
        alone, slowed, gathers = side_by_side(multiply, gather_once, times[1], times[0])
        if not torch.equal(out[0], values.index_select(0, ids)):
            raise WrongError("the rows are not the table's")
        amount = out[0].numel() * out[0].element_size()
        rate = amount / median(gathers) * 1e3
        for row, spent in zip(rows, (gathers, slowed, alone), strict=True):
            row |= timing([Sample(ms, 0.0) for ms in spent]) | {"host_ms": "", "of_ceiling": "", "flops": 0, "bytes": 0}
        rows[0] |= {"bytes": amount, "ceiling": "pinned copy in", "rate": rate}
        rows[0]["of_ceiling"] = rate / bench.ceilings["pinned copy in"]
        rows[1]["times_ours"] = median(slowed) / median(alone)
    except Exception as error:
        for row in rows:
            row["status"] = failure(error)
    return rows
