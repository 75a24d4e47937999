"""Cases of the ops with products: sparse_ffn, forward and backward."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adapter_kernels.ffn import sparse_ffn_plain
from benchmarks.kernel_bench.inputs import OURS, Bench, Case, Planned, close, find, forced_picks, leaves, union_size
from benchmarks.kernel_bench.timing import Contestant

YARDSTICK, BARE, DENSE = "torch, mask and ReLU apart", "the bare GEMMs", "dense adapter of all r"
TOKEN, MASKED = "ours, token form", "ours, masked form"


def plain_forward(x: Tensor, keys: Tensor, values: Tensor, position: Tensor, factors: Tensor) -> Tensor:
    """The yardstick: two GEMMs over the compact rows, the mask and ReLU as operations of their own."""
    return sparse_ffn_plain.forward(x, keys, values, position, factors, None)


def plain_backward(
    g: Tensor, x: Tensor, keys: Tensor, values: Tensor, position: Tensor, factors: Tensor
) -> tuple[Tensor, ...]:
    """Its gradient, five GEMMs: the scores are computed again."""
    made = sparse_ffn_plain.backward(g, x, keys, values, position, factors, [True] * 4, keys.dtype)
    return tuple(grad for grad in made if grad is not None)


def check_gradients(expected: list[Tensor]) -> Callable[[tuple[Tensor, ...]], None]:
    """Each one within its dtype's error; in bf16 twice that, since it went through more roundings than an output."""

    def verify(result: tuple[Tensor, ...]) -> None:
        for name, found, wide in zip(("dx", "dkeys", "dvalues", "dfactors"), result, expected, strict=False):
            close(found, wide, name, 2e-2 if found.dtype == torch.bfloat16 else 1e-5)

    return verify


def sparse(bench: Bench) -> list[Planned]:
    """The sparse FFN on compact rows beside the yardstick, the bare GEMMs and the dense adapter."""
    op, d, K = find("sparse_ffn"), bench.shapes.d, bench.shapes.K

    def inputs(T: int, r: int, U: int) -> tuple[list[Tensor], Tensor, Tensor]:
        ids = forced_picks(T, K, r, U, bench.generator(7))
        position = ids.unique(return_inverse=True)[1].view(T, K)
        x, factors = bench.randn(T, d, seed=1), bench.randn(T, K, seed=2)
        rows = [bench.randn(U, d, seed=seed, scale=0.02) for seed in (3, 4)]
        return [x, *rows], position, factors

    def build(r: int, T: int, share: float, backward: bool) -> Case:
        U = union_size(r, share)
        (x, keys, values), position, factors = inputs(T, r, U)
        short = position.to(torch.int32)
        wide = x.float(), keys.float(), values.float()
        active, out = torch.empty(T, U, dtype=x.dtype, device=x.device), torch.empty_like(x)
        whole = [bench.randn(r, d, seed=seed, scale=0.02) for seed in (5, 6)]

        def bare() -> None:
            torch.mm(x, keys.T, out=active)
            torch.mm(active, values, out=out)

        size = x.element_size()
        if not backward:
            expected = plain_forward(*wide, position, factors.float())
            contestants = {
                OURS: Contestant(lambda: op(x, keys, values, short, factors, impl=bench.impl)),
                YARDSTICK: Contestant(lambda: plain_forward(x, keys, values, position, factors)),
                BARE: Contestant(bare, verify=unchecked),
                DENSE: Contestant(lambda: (x @ whole[0].T).relu() @ whole[1], verify=unchecked, same_work=False),
            }
            moved = (2 * T + 2 * U) * d * size + T * K * (4 + size)
            return Case(contestants, lambda y: close(y, expected, "y"), moved, "GEMM", 4 * T * U * d)
        g, grads = bench.randn(T, d, seed=8), [torch.empty_like(rows) for rows in (keys, values)]
        gradients = list(plain_backward(g.float(), *wide, position, factors.float()))
        tracked = leaves(x, keys, values, factors)
        y = op(*tracked[:3], short, tracked[3], impl=bench.impl)
        dense_leaves = leaves(x, *whole)
        dense_y = (dense_leaves[0] @ dense_leaves[1].T).relu() @ dense_leaves[2]

        def bare_backward() -> None:
            torch.mm(x, keys.T, out=active)
            torch.mm(g, values.T, out=active)
            torch.mm(active, keys, out=out)
            for target, rows in zip(grads, (x, g), strict=True):
                torch.mm(active.T, rows, out=target)

        contestants = {
            OURS: Contestant(lambda: torch.autograd.grad(y, tracked, g, retain_graph=True)),
            YARDSTICK: Contestant(lambda: plain_backward(g, x, keys, values, position, factors)),
            BARE: Contestant(bare_backward, verify=unchecked),
            DENSE: Contestant(
                lambda: torch.autograd.grad(dense_y, dense_leaves, g, retain_graph=True),
                verify=unchecked,
                same_work=False,
            ),
        }
        moved = (3 * T + 4 * U) * d * size + T * K * (4 + 2 * size)
        return Case(contestants, check_gradients(gradients), moved, "GEMM", 10 * T * U * d)

    def build_decoding(T: int, r: int) -> Case:
        U = min(T * K, union_size(r, bench.shapes.main[2]))
        (x, keys, values), position, factors = inputs(T, r, U)
        short = position.to(torch.int32)
        expected = plain_forward(x.float(), keys.float(), values.float(), position, factors.float())

        def in_form(limit: int) -> Tensor:
            with token_form(limit):
                return op(x, keys, values, short, factors, impl=bench.impl)

        contestants = {
            OURS: Contestant(lambda: op(x, keys, values, short, factors, impl=bench.impl)),
            TOKEN: Contestant(lambda: in_form(T)),
            MASKED: Contestant(lambda: in_form(0)),
            YARDSTICK: Contestant(lambda: plain_forward(x, keys, values, position, factors)),
        }
        moved = (2 * T + 2 * U) * d * x.element_size() + T * K * (4 + x.element_size())
        return Case(contestants, lambda y: close(y, expected, "y"), moved, "device copy", 4 * T * K * d)

    plan = [
        Planned(
            "backward" if back else "forward",
            {"r": r, "T": T, "share": share},
            partial(build, r, T, share, back),
        )
        for r, T, share in bench.shapes.layers()
        for back in (False, True)
    ]
    r = bench.shapes.main[0]
    decoding = [Planned("decoding", {"r": r, "T": T}, partial(build_decoding, T, r)) for T in bench.shapes.decoding]
    return plan[:2] + decoding + plan[2:]


@contextlib.contextmanager
def token_form(limit: int) -> Iterator[None]:
    """Another number of tokens up to which the op takes its token form."""
    module: Any = importlib.import_module("adapter_kernels.ffn.sparse_ffn_token_triton")
    before, module.MAX_TOKENS = module.MAX_TOKENS, limit
    try:
        yield
    finally:
        module.MAX_TOKENS = before


def unchecked(result: object) -> None:
    """Of what computes something else on purpose: a scale, not a rival."""


def gate_ffn(bench: Bench) -> None:
    """Output and gradients on few tokens beside the package's own reference in float64, in both forms."""
    from adapter_kernels.ffn import naive

    op, d = find("sparse_ffn"), 96
    for T in (3, 37):
        position = forced_picks(T, 4, 11, 11, bench.generator(1))
        position[0, 1] = -1
        tensors = [bench.randn(T, d, seed=2), *(bench.randn(11, d, seed=s, scale=0.1) for s in (3, 4))]
        tensors.append(bench.randn(T, 4, seed=5))
        tracked, wide = leaves(*tensors), leaves(*(tensor.cpu().double() for tensor in tensors))
        y = op(*tracked[:3], position, tracked[3], impl=bench.impl)
        expected = naive.sparse_ffn(wide[0], wide[1], wide[2], position.cpu(), wide[3])
        close(y.detach().cpu(), expected.detach(), "sparse_ffn: y")
        g = bench.randn(T, d, seed=6)
        found = torch.autograd.grad(y, tracked, g)
        gradients = torch.autograd.grad(expected, wide, g.cpu().double())
        check_gradients(list(gradients))(tuple(grad.cpu() for grad in found))
