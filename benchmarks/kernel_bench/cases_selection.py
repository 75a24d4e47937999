"""Cases of the ops that choose neurons: router_topk, row_union, both together, expert_topk."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_bench.inputs import OURS, Bench, Case, Planned, close, find, require, union_size
from benchmarks.kernel_bench.timing import Contestant

WINDOW, EXACT = "ours, window of fixed size", "ours, exact size"
DENSE = "GEMM over all keys, masked top-k"


def check_experts(logits: Tensor, P: int, exact: bool, result: tuple[Tensor, Tensor]) -> None:
    """The P largest; with `exact`, ties to the lower expert too."""
    experts, picked = result
    order = logits.sort(dim=1, descending=True, stable=True)
    require(torch.equal(picked, order.values[:, :P]), "the picked logits are not the largest")
    require(torch.equal(logits.gather(1, experts.long()), picked), "a logit is not its expert's")
    require(not exact or torch.equal(experts.long(), order.indices[:, :P]), "ties do not go to the lower expert")


def check_union(ids: Tensor, U: int, result: tuple[Tensor, ...]) -> None:
    """The distinct ids in ascending order, as many as were forced, and each pick's place."""
    rows, position = result[0], result[-1]
    expected = ids.unique()
    require(len(expected) == U, f"the inputs have {len(expected)} distinct rows, not {U}")
    require(torch.equal(rows[:U].long(), expected.long()), "the rows are not the union")
    require(torch.equal(rows[position.long()].long(), ids.long()), "a position is not its pick's")


def routing(bench: Bench) -> list[Planned]:
    """The experts of each token, beside torch's top-k and stable sort."""
    topk, P = find("router_topk"), bench.shapes.P

    def build(E: int, T: int) -> Case:
        logits = bench.randn(T, E, seed=1)

        def by_sort() -> tuple[Tensor, Tensor]:
            found = logits.sort(dim=1, descending=True, stable=True)
            return found.indices[:, :P], found.values[:, :P]

        contestants = {
            OURS: Contestant(lambda: topk(logits, P, impl=bench.impl)),
            "torch.topk": Contestant(
                lambda: torch.topk(logits, P)[::-1], verify=lambda result: check_experts(logits, P, False, result)
            ),
            "torch.sort": Contestant(by_sort),
        }
        moved = T * (E + P) * logits.element_size() + 4 * T * P
        return Case(contestants, lambda result: check_experts(logits, P, True, result), moved, "device copy")

    batches = [(bench.shapes.experts(r), T) for r, T in bench.shapes.batches()]
    return [Planned("", {"E": E, "T": T}, partial(build, E, T)) for E, T in batches]


def union(bench: Bench) -> list[Planned]:
    """The union of the picks, beside torch.unique."""
    exact, window, K = find("row_union"), find("row_union_window"), bench.shapes.K

    def build(r: int, T: int, share: float) -> Case:
        ids = bench.picks(T, r, share)
        capacity = min(r, T * K)
        contestants = {
            WINDOW: Contestant(lambda: window(ids, r, capacity, impl=bench.impl)),
            EXACT: Contestant(lambda: exact(ids, r, impl=bench.impl), waits=True),
            "torch.unique": Contestant(lambda: torch.unique(ids, return_inverse=True), waits=True),
        }
        U = union_size(r, share)
        return Case(contestants, lambda result: check_union(ids, U, result), 4 * (2 * T * K + U), "device copy")

    return [
        Planned("", {"r": r, "T": T, "share": share}, partial(build, r, T, share))
        for r, T, share in bench.shapes.layers()
    ]


def routing_and_union(bench: Bench) -> list[Planned]:
    """Both, as a layer calls them, without waiting for the device."""
    topk, window = find("router_topk"), find("row_union_window")
    K, P, share = bench.shapes.K, bench.shapes.P, bench.shapes.main[2]

    def build(r: int, T: int) -> Case:
        logits, ids = bench.randn(T, bench.shapes.experts(r), seed=1), bench.picks(T, r, share)
        capacity, U = min(r, T * K), union_size(r, share)

        def both() -> tuple[Any, Any]:
            return topk(logits, P, impl=bench.impl), window(ids, r, capacity, impl=bench.impl)

        def by_torch() -> tuple[Any, Any]:
            return torch.topk(logits, P)[::-1], torch.unique(ids, return_inverse=True)

        def verify(exact: bool, result: tuple[Any, Any]) -> None:
            check_experts(logits, P, exact, result[0])
            check_union(ids, U, result[1])

        contestants = {
            OURS: Contestant(both),
            "torch.topk, torch.unique": Contestant(by_torch, waits=True, verify=lambda result: verify(False, result)),
        }
        moved = logits.numel() * logits.element_size() + 4 * (2 * T * (K + P) + U)
        return Case(contestants, lambda result: verify(True, result), moved, "device copy")

    return [
        Planned("", {"r": r, "E": bench.shapes.experts(r), "T": T, "share": share}, partial(build, r, T))
        for r, T in bench.shapes.batches()
    ]


def check_neurons(
    x: Tensor, keys: Tensor, experts: Tensor, factors: Tensor, E: int, relative: float, ids: Tensor
) -> None:
    """A pick may differ from the float64 one only where the two scores are equal but for rounding.

    Args:
        relative: the rounding of a score; in addition 1e-5 of the norms, for the sum in fp32.
    """
    (T, K), each = ids.shape, len(keys) // E
    wide = x.double()
    factor = torch.zeros(T, E, dtype=torch.float64, device=x.device).scatter_(1, experts.long(), factors.double())
    scores = (wide @ keys.double().T) * factor.repeat_interleave(each, dim=1)
    best = scores.clamp(min=0).topk(K, dim=1).values
    mine = scores.gather(1, ids.clamp(min=0).long()).where(ids >= 0, 0)
    norms = wide.norm(dim=1) * keys.double().norm(dim=1).max() * factors.double().abs().amax(dim=1)
    allowed = relative * best[:, :1] + 1e-5 * norms[:, None]
    worst = ((best - mine.sort(dim=1, descending=True).values).abs() - allowed).max().item()
    require(worst <= 0, f"a pick's score is {worst:.3g} more away from the best than rounding explains")
    ordered = ids.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    require(not bool(twice.any()), "a neuron is picked twice")


def neurons(bench: Bench) -> list[Planned]:
    """The picks among all neurons of the probed experts, beside a dense GEMM with a masked top-k."""
    topk, K, P, d = find("expert_topk"), bench.shapes.K, bench.shapes.P, bench.shapes.d

    def build(r: int, T: int) -> Case:
        E = bench.shapes.experts(r)
        x, keys = bench.randn(T, d, seed=1), bench.randn(r, d, seed=2, scale=0.02)
        factors, experts = bench.randn(T, E, seed=3).topk(P, dim=1)
        experts = experts.to(torch.int32)

        def dense() -> tuple[Tensor, Tensor]:
            factor = torch.zeros(T, E, dtype=x.dtype, device=x.device).scatter_(1, experts.long(), factors)
            scores = (x @ keys.T).view(T, E, r // E) * factor[:, :, None]
            best, ids = scores.flatten(1).topk(K, dim=1)
            return ids.where(best > 0, -1), best

        def verify(relative: float, result: tuple[Tensor, ...]) -> None:
            check_neurons(x, keys, experts, factors, E, relative, result[0])

        contestants = {
            OURS: Contestant(lambda: topk(x, keys, experts, factors, K, E=E, impl=bench.impl)),
            # Its dots and its products with the factor are rounded to x's dtype.
            DENSE: Contestant(dense, verify=lambda result: verify(4 * torch.finfo(x.dtype).eps, result)),
        }
        moved = (r + T) * d * x.element_size() + 12 * T * K
        return Case(contestants, lambda result: verify(1e-6, result), moved, "device copy", 2 * T * P * (r // E) * d)

    return [
        Planned("", {"r": r, "E": bench.shapes.experts(r), "T": T}, partial(build, r, T))
        for r, T in bench.shapes.batches()
    ]


def gate_selection(bench: Bench) -> None:
    """All four ops on few tokens, beside the package's own reference in float64."""
    from adapter_kernels.rows import naive as naive_rows
    from adapter_kernels.topk import naive

    topk, experts_topk, union_op = find("router_topk"), find("expert_topk"), find("row_union")
    T, E, each, P, K, d = 37, 16, 20, 5, 8, 96
    # Small integers: all sums are exact, so the picks must be the reference's, ties included.
    whole = lambda *shape, seed: bench.randn(*shape, seed=seed, dtype=torch.float32).mul(2).round().to(bench.dtype)  # noqa: E731
    x, keys, logits = whole(T, d, seed=1), whole(E * each, d, seed=2), whole(T, E, seed=3)
    experts, factors = topk(logits, P, impl=bench.impl)
    found = naive.router_topk(logits.cpu(), P)
    require(
        torch.equal(experts.cpu(), found[0]) and torch.equal(factors.cpu(), found[1]), "router_topk: the picks differ"
    )
    ids, scores, dots = experts_topk(x, keys, experts, factors, K, E=E, impl=bench.impl)
    expected = naive.expert_topk(x.cpu().double(), keys.cpu().double(), experts.cpu(), factors.cpu().double(), K, E)
    require(torch.equal(ids.cpu(), expected[0]), "expert_topk: the picks differ")
    close(scores.cpu(), expected[1], "expert_topk: scores", 1e-6)
    close(dots.cpu(), expected[2], "expert_topk: dots", 1e-6)
    rows, position = union_op(ids, E * each, impl=bench.impl)
    union_rows, union_position = naive_rows.row_union(ids.cpu(), E * each)
    same = torch.equal(rows.cpu(), union_rows) and torch.equal(position.cpu(), union_position)
    require(same, "row_union: rows or positions differ")
