"""What each op is held against on a device: the checks of its interpreter tests, which notice a wrong kernel."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

import adapter_kernels
from benchmarks.device.findings import use_tests

use_tests()

from tests.support.kernels import adamw_checks, ffn_checks, kernel_checks, row_checks, selection_checks  # noqa: E402
from tests.support.kernels.mutations import MUTATIONS, is_noticed  # noqa: E402
from tests.support.kernels.on_device import on_device  # noqa: E402
from tests.support.kernels.selection_checks import generator  # noqa: E402

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Op = Callable[..., object]


@dataclass(frozen=True)
class Check:
    """A check of an op; `dtype` is "" where it has none."""

    what: str
    dtype: str
    run: Callable[[], None]


class Battery:
    """The checks of all ops on a device.

    Args:
        tiny: a few small ones, for the interpreter and for compute-sanitizer.
        dtypes: names in `DTYPES`; what has no dtype belongs to "fp32".
    """

    def __init__(self, device: torch.device, tiny: bool, dtypes: Sequence[str] = tuple(DTYPES)) -> None:
        self.device, self.tiny = device, tiny
        self.dtypes = {name: DTYPES[name] for name in dtypes}

    def at(self, op: Op) -> Op:
        """The op's kernels, on the device, for arguments on the CPU."""
        return on_device(partial(op, impl="triton"), self.device)

    def of(self, op: str, right_only: bool = False) -> list[Check]:
        """An op's checks; unless `right_only` the last one has a kernel with a changed line, which must not pass."""
        found = [Check(what, dtype, partial(in_fences, run)) for what, dtype, run in getattr(self, f"_{op}")()]
        if not right_only:
            found.append(Check("a wrong kernel is noticed", "", partial(self._noticed, op)))
        return found

    def _router_topk(self) -> Iterator[tuple[str, str, Callable[[], None]]]:
        op = self.at(adapter_kernels.router_topk)
        for name, dtype in self.dtypes.items():
            for T, E, P in ((37, 12, 5),) if self.tiny else ((37, 12, 5), (512, 320, 8), (2048, 368, 8), (2, 1000, 32)):
                logits = (4 * torch.randn(T, E, generator=generator())).round().to(dtype) / 4
                logits[1, 2:5] = torch.tensor([torch.nan, -torch.nan, -0.0])
                yield f"T {T} E {E}", name, partial(selection_checks.check_router, op, logits, P)

    def _row_union(self) -> Iterator[tuple[str, str, Callable[[], None]]]:
        if "fp32" not in self.dtypes:
            return
        op, window = self.at(adapter_kernels.row_union), self.at(adapter_kernels.row_union_window)
        shapes = [(9, 7, 50)] if self.tiny else [(9, 7, 50), (512, 64, 6400), (512, 4, 1025), (3, 2, 1024)]
        for T, K, r in shapes:
            ids = torch.randint(-1, r, (T, K), generator=generator(), dtype=torch.int32)
            valid = torch.rand(T, K, generator=generator(1)) < 0.7
            yield f"T {T} r {r}", "", partial(selection_checks.check_union, op, ids, r)
            yield f"T {T} r {r}, some not valid", "", partial(selection_checks.check_union, op, ids, r, valid)
            yield f"T {T} r {r}, windows", "", partial(selection_checks.check_window, window, ids, r, r // 3)
            yield f"T {T} r {r}, counted", "", partial(selection_checks.check_load, window, ids, r, math.gcd(r, 320))

    def _expert_topk(self) -> Iterator[tuple[str, str, Callable[[], None]]]:
        op, Case = self.at(adapter_kernels.expert_topk), selection_checks.Case
        exactly = selection_checks.check_expert_exactly
        for name, dtype in self.dtypes.items():
            whole = partial(Case, dtype=dtype, integers=True)
            yield "integers", name, partial(exactly, op, whole(37, 12, E=7, each=5, P=3, K=6))
            yield "unaligned rows", name, partial(exactly, op, whole(20, 33, E=2, each=3, P=1, K=3))
            if self.tiny:
                continue
            yield "many neurons an expert", name, partial(exactly, op, whole(40, 304, E=3, each=130, P=2, K=70))
            for layout in kernel_checks.LAYOUTS:
                case = Case(96, 4096, E=32, each=20, P=8, K=64, dtype=dtype, layout=layout)
                yield f"d 4096, {layout}", name, partial(few_differ, op, case)
            yield "T 512 r 6400", name, partial(few_differ, op, Case(512, 4096, E=320, each=20, P=8, K=64, dtype=dtype))
        if "fp32" not in self.dtypes:
            return
        case = Case(4, 8, E=5, each=4, P=3, K=9, integers=True)
        yield "by neuron", "fp32", partial(selection_checks.check_by_neuron, op, case)
        ops = self.at(adapter_kernels.router_topk), op, self.at(adapter_kernels.row_union)
        yield "NaN", "fp32", partial(selection_checks.check_nan, *ops)

    def _gather_rows(self) -> Iterator[tuple[str, str, Callable[[], None]]]:
        gather, scatter = self.at(adapter_kernels.gather_rows), self.at(adapter_kernels.scatter_rows)
        shapes = [(37, 72, 50), (3, 7, 50)] if self.tiny else [(1664, 4096, 6400), (37, 576, 50), (5, 4100, 50)]
        for name, dtype in self.dtypes.items():
            for n, d, r in shapes:
                for tables in (1, 2):
                    both = [row_checks.table(r, d, dtype, seed) for seed in range(tables)]
                    ids = torch.randint(-1, r, (n,), generator=generator(), dtype=torch.int32)
                    what = f"{tables} x {n} rows of {d}"
                    yield what, name, partial(row_checks.check_gather, gather, ids, both)
                    places = torch.randperm(r, generator=generator(1))[:n]
                    places[n // 2] = -1
                    rows = [row_checks.table(n, d, dtype, seed) for seed in range(tables)]
                    yield f"{what}, back", name, partial(row_checks.check_scatter, scatter, places, rows, (r, d))

    def _sparse_ffn(self) -> Iterator[tuple[str, str, Callable[[], None]]]:
        op = self.at(adapter_kernels.sparse_ffn)
        backward = on_device(adapter_kernels.sparse_ffn_backward, self.device)  # the check says which implementation
        for name, dtype in self.dtypes.items():
            cases = {"masked form": (20, 40, 17, 5), "token form": (3, 40, 9, 5), "unaligned rows": (20, 33, 7, 12)}
            if not self.tiny:
                cases |= {
                    "d 4096": (64, 4096, 416, 64), "T 300": (300, 512, 640, 64), "d 576": (130, 576, 700, 64),
                    "d 4100": (70, 4100, 70, 5), "decoding": (2, 4096, 128, 64),
                }  # fmt: skip
            for what, (T, d, U, K) in cases.items():
                layouts = kernel_checks.LAYOUTS if what in ("d 576", "token form") else ["contiguous"]
                for layout in layouts:
                    case = ffn_checks.Case(T, d, U, K, dtype, layout=layout, narrow=T == 130)
                    yield f"{what}, {layout}", name, partial(ffn_checks.check_ffn, op, case)
            case = ffn_checks.Case(20, 24, 7, 12, dtype, factor=False, base=False)
            yield "no factor", name, partial(ffn_checks.check_ffn, op, case)
            if dtype.itemsize == 2:
                case = ffn_checks.Case(256 if self.tiny else 600, 32, 9, 9, dtype)
                check = partial(ffn_checks.check_wide_row_gradients, "triton", case, backward)
                yield "row gradients in float32", name, check

    def _row_adamw(self) -> Iterator[tuple[str, str, Callable[[], None]]]:
        op, Tables = self.at(adapter_kernels.row_adamw), adamw_checks.Tables
        shapes = [(5, 33)] if self.tiny else [(13, 576), (5, 33), (64, 4096)]
        for table in ("fp32", "bf16"):
            for name, dtype in self.dtypes.items():
                for n, d in shapes:
                    compute_dtype = (torch.bfloat16 if name == "fp32" else dtype) if table == "fp32" else None
                    tables = Tables(80, d, DTYPES[table], compute_dtype=compute_dtype)
                    rows = torch.randperm(80, generator=generator(1))[:n]
                    grads = torch.randn(n, d, generator=generator(2)).to(dtype)
                    for decoupled in (True, False):
                        check = partial(adamw_checks.check_adamw, op, tables, rows, grads, decoupled=decoupled)
                        yield f"{table} table, {n} rows of {d}, {'AdamW' if decoupled else 'Adam'}", name, check
            if table in self.dtypes:
                yield f"{table} table, bits of the torch path", table, partial(self._same_bits, op, DTYPES[table])

    def _same_bits(self, op: Op, table: torch.dtype) -> None:
        """Three steps by the kernel and by torch operations on the CPU."""
        compute_dtype = torch.float16 if table == torch.float32 else None
        both = [adamw_checks.Tables(40, 300, table, compute_dtype=compute_dtype) for _ in range(2)]
        for step in range(3):
            rows = torch.randperm(40, generator=generator(step))[:30].to(torch.int32)
            grads = torch.randn(30, 300, generator=generator(step))
            for tables, by in zip(both, (op, adapter_kernels.row_adamw), strict=True):
                tables.step(by, rows, grads, betas=(0.9, 0.99), seed=7)
        for name in both[0].fenced:
            assert torch.equal(both[0][name], both[1][name]), f"{name}: other bits than the torch path's"

    def _noticed(self, op: str) -> None:
        first = next(each for each in MUTATIONS if each.op == op)
        with tempfile.TemporaryDirectory() as folder:
            noticed = is_noticed(first, Path(folder), self.device)
        assert noticed, f"{op} with {first.after!r} in place of {first.before!r} passes its check"


def in_fences(run: Callable[[], None]) -> None:
    """A check; what the op allocates is poisoned and fenced."""
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        stack.enter_context(kernel_checks.fenced_memory(patch))
        run()


def few_differ(op: Op, case: selection_checks.Case) -> None:
    """Within rounding, and at most one pick in a hundred is another one."""
    differing, picks = selection_checks.check_expert(op, case)
    assert picks, "nothing was picked"
    assert differing <= 0.01 * picks, f"{differing} of {picks} picks differ"
