"""Checks of the three ops that select, for any implementation of them: the torch path, the kernel, a broken one."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from adapter_kernels.rows import naive as naive_rows
from adapter_kernels.topk import naive
from tests.support.kernels.kernel_checks import EPS, IN_NORM, LAYOUTS

Op = Callable[..., tuple[Tensor, ...]]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check_router(op: Op, logits: Tensor, P: int) -> None:
    """Ids and raw logits bit by bit, NaN included."""
    experts, picked = op(logits, P)
    oracle, values = naive.router_topk(logits, P)
    assert experts.dtype == torch.int32
    assert torch.equal(experts, oracle)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[logits.element_size()]
    assert torch.equal(picked.view(integer), values.contiguous().view(integer))


def check_union(op: Op, ids: Tensor, r: int, valid: Tensor | None = None) -> None:
    """Rows and positions exactly."""
    rows, position = op(ids, r, valid=valid)
    oracle_rows, oracle_position = naive_rows.row_union(ids, r, valid)
    assert rows.dtype == position.dtype == torch.int32
    assert torch.equal(rows, oracle_rows)
    assert torch.equal(position, oracle_position)


def check_window(op: Op, ids: Tensor, r: int, capacity: int, valid: Tensor | None = None) -> None:
    """Windows, one after the other, hold the whole union; each pick is in exactly one; the flag ends them."""
    oracle, oracle_position = naive_rows.row_union(ids, r, valid)
    for start in range(0, max(1, len(oracle)), capacity):
        rows, count, more, position = op(ids, r, capacity, start=start, valid=valid)
        part = oracle[start : start + capacity]
        assert torch.equal(rows[: len(part)], part)
        assert bool((rows[len(part) :] == -1).all())
        assert count.item() == len(oracle)
        assert bool(more) == (start + capacity < len(oracle))
        inside = (oracle_position >= start) & (oracle_position < start + capacity)
        assert torch.equal(position, torch.where(inside, oracle_position - start, -1))


def check_load(op: Op, ids: Tensor, r: int, E: int, valid: Tensor | None = None) -> None:
    """Picks of each group of rows are added to what was there, and all else is as without counting."""
    before = torch.arange(E) << 33
    load = before.clone()
    found = op(ids, r, max(1, r // 2), valid=valid, load=load)
    assert torch.equal(load, before + naive_rows.load_of(ids, r, E, valid))
    for mine, other in zip(found, op(ids, r, max(1, r // 2), valid=valid), strict=True):
        assert torch.equal(mine, other)


class Case:
    """Arguments of expert_topk."""

    def __init__(
        self, T, d, E, each, P, K, *, dtype=torch.float32, integers=False, factor=True, seed=0, layout="contiguous"
    ):
        g = generator(seed)

        def values(*shape):
            if integers:
                return torch.randint(-2, 3, shape, generator=g).to(dtype)
            return torch.randn(*shape, generator=g).to(dtype)

        self.E, self.K = E, K
        self.x = LAYOUTS[layout](values(T, d)) if T else values(T, d)
        self.keys = LAYOUTS["contiguous"](values(E * each, d))
        self.experts = torch.rand(T, E, generator=g).argsort(1)[:, :P].to(torch.int32)
        self.factors = values(T, P) if factor else None

    def run(self, op: Op) -> tuple[Tensor, ...]:
        return op(self.x, self.keys, self.experts, self.factors, self.K, E=self.E)

    def in_float64(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        factors = self.factors.double() if self.factors is not None else None
        return self.x.double(), self.keys.double(), self.experts, factors


def check_expert_exactly(op: Op, case: Case) -> None:
    """Integer-valued inputs: every sum is exact, so picks, order and scores must be too."""
    for out, oracle in zip(case.run(op), naive.expert_topk(*case.in_float64(), case.K, case.E), strict=True):
        assert torch.equal(out.double(), oracle.double())


def check_nan(router: Op, op: Op, union: Op) -> None:
    """Whatever is NaN, every id is one of those that there are, and each op after the other goes through."""
    E, each, P, K = 5, 4, 3, 6
    for spoil in ("x", "keys", "logits", "all"):
        case = Case(6, 8, E=E, each=each, P=P, K=K)
        logits = torch.randn(6, E, generator=generator(1))
        for name, tensor in (("x", case.x), ("keys", case.keys), ("logits", logits)):
            if spoil in (name, "all"):
                tensor[1], tensor[3, 2] = torch.nan, -torch.nan
        experts, factors = router(logits, P)
        assert bool(((experts >= 0) & (experts < E)).all())
        assert all(len(row.unique()) == P for row in experts)
        ids, scores, _ = op(case.x, case.keys, experts, factors, K, E=E)
        assert bool(((ids >= -1) & (ids < E * each)).all())
        assert not scores.isnan().any()
        assert bool(
            (torch.gather(experts, 1, experts.argsort(1))[:, :, None] == ids[:, None] // each).any(1)[ids >= 0].all()
        )
        rows, position = union(ids, E * each)
        assert torch.equal(rows[position[ids >= 0].long()], ids[ids >= 0])


def check_by_neuron(op: Op, case: Case) -> None:
    """The same picks, each with its own score and dot, in ascending order with empty slots anywhere."""
    expected = case.run(op)
    found = op(case.x, case.keys, case.experts, case.factors, case.K, E=case.E, by_neuron=True)
    for t in range(len(case.x)):
        used = found[0][t] >= 0
        assert bool((found[0][t][used].diff() > 0).all())
        assert bool((found[0][t][~used] == -1).all() and (found[1][t][~used] == 0).all())
        assert bool((found[2][t][~used] == 0).all())
        n = int(used.sum())
        order = expected[0][t, :n].argsort()
        for mine, theirs in zip(found, expected, strict=True):
            assert torch.equal(mine[t][used], theirs[t, :n][order])
            assert bool((expected[0][t, n:] == -1).all())


def check_expert(op: Op, case: Case) -> tuple[int, int]:
    """Scores within their bounds; a pick that the oracle does not have only within the rounding of its rival's.

    Returns:
        how many picks differ, and how many there are.
    """
    ids, scores, dots = case.run(op)
    x, keys, experts, factors = case.in_float64()
    oracle, bare = naive.expert_scores(x, keys, experts, factors, case.E)
    # |x| . |w| of each, with the factor's size: what the rounding of a sum is proportional to.
    sizes, bare_sizes = naive.expert_scores(
        x.abs(), keys.abs(), experts, factors.abs() if factors is not None else None, case.E
    )
    rounding = 4 * math.sqrt(x.shape[1]) * EPS[torch.float32]
    bound = 4 * EPS[torch.float32] * oracle.abs() + rounding * sizes
    bare_bound = 4 * EPS[torch.float32] * bare.abs() + rounding * bare_sizes
    differing = picks = 0
    errors, norm = torch.zeros(len(x), dtype=torch.float64), oracle.new_zeros(len(x))
    for t in range(len(x)):
        n = int((ids[t] >= 0).sum())
        mine = ids[t, :n].long()
        assert bool((ids[t, n:] == -1).all()), "picks after the last"
        assert bool((scores[t, n:] == 0).all() and (dots[t, n:] == 0).all())
        assert len(mine.unique()) == n, "a neuron twice"
        assert bool(oracle[t, mine].isfinite().all()), "a neuron of an expert that the token does not use"
        assert bool(((scores[t, :n].double() - oracle[t, mine]).abs() <= bound[t, mine]).all()), "a score is off"
        assert bool(((dots[t, :n].double() - bare[t, mine]).abs() <= bare_bound[t, mine]).all()), "a dot is off"
        assert bool((scores[t, :n] > 0).all())
        errors[t], norm[t] = (scores[t, :n].double() - oracle[t, mine]).norm(), oracle[t, mine].norm()
        assert bool((scores[t, : max(0, n - 1)] >= scores[t, 1:n]).all()), "not in descending order"
        theirs = (oracle[t] > 0).nonzero().flatten()
        theirs = theirs[oracle[t, theirs].argsort(descending=True, stable=True)][: case.K]
        missed = theirs[~torch.isin(theirs, mine)]
        extra = mine[~torch.isin(mine, theirs)]
        for neuron in missed:
            # Its rival is the least of my picks, or zero where there was room for more.
            least = mine[oracle[t, mine].argmin()] if n == case.K else None
            rival, slack = (oracle[t, least], bound[t, least]) if least is not None else (0.0, 0.0)
            assert oracle[t, neuron] - rival <= bound[t, neuron] + slack, "a larger score was left out"
        for neuron in extra:
            rival, slack = (oracle[t, theirs[-1]], bound[t, theirs[-1]]) if len(theirs) == case.K else (0.0, 0.0)
            assert rival - oracle[t, neuron] <= bound[t, neuron] + slack, "a smaller score was picked"
        differing += max(len(missed), len(extra))
        picks += len(theirs)
    assert errors.norm() <= IN_NORM[torch.float32] * norm.norm(), "scores are off in norm"
    return differing, picks
