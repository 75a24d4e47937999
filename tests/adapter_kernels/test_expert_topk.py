"""expert_topk on the CPU: the torch path against the oracle, against the whole method, registration, errors."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapter_kernels import debugging, expert_topk, router_topk, row_union
from adapter_kernels.topk.expert_topk import _op
from tests.support.kernels.selection_checks import (
    Case,
    check_by_neuron,
    check_expert,
    check_expert_exactly,
    check_nan,
    generator,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "strided", "permuted"])
@pytest.mark.parametrize("impl", [None, "torch"])
def test_scores_and_picks(dtype, layout, impl):
    op = partial(expert_topk, impl=impl)
    differing, picks = check_expert(op, Case(37, 576, E=16, each=23, P=4, K=20, dtype=dtype, layout=layout))
    assert picks == 20 * 37
    assert differing <= (0 if dtype == torch.float64 else 0.01 * picks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", [None, "torch"])
def test_exact_on_integers_with_ties(dtype, impl):
    op = partial(expert_topk, impl=impl)
    check_expert_exactly(op, Case(50, 12, E=7, each=5, P=3, K=6, dtype=dtype, integers=True))
    check_expert_exactly(op, Case(0, 12, E=7, each=5, P=3, K=6, dtype=dtype))


@given(st.integers(0, 6), st.integers(1, 6), st.integers(1, 9), st.integers(1, 60), st.booleans(), st.data())
def test_any_shape(T, E, each, K, factor, data):
    P = data.draw(st.integers(1, E))
    case = Case(T, 5, E=E, each=each, P=P, K=K, factor=factor, integers=True, seed=data.draw(st.integers(0, 99)))
    if factor and T:
        case.factors[0, 0] = data.draw(st.sampled_from([torch.inf, -torch.inf, torch.nan, 0.0]))
    case.experts[torch.rand(T, P, generator=generator()) < 0.2] = -1
    check_expert_exactly(expert_topk, case)


@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.parametrize(("x", "keys"), [("float32", "bfloat16"), ("float32", "float16"), ("float64", "float32")])
def test_narrower_keys_are_widened(x, keys, T):
    case = Case(T, 24, E=7, each=5, P=3, K=6, dtype=getattr(torch, keys))
    case.x = case.x.to(getattr(torch, x))
    differing, picks = check_expert(expert_topk, case)
    assert differing <= 0.01 * picks
    for impl in (None, "torch"):
        given = (case.experts, case.factors, case.K)
        own = expert_topk(case.x, case.keys, *given, E=case.E, impl=impl)
        wide = expert_topk(case.x, case.keys.to(case.x.dtype), *given, E=case.E, impl=impl)
        assert all(map(torch.equal, own, wide))


@pytest.mark.parametrize("factor", [True, False])
@pytest.mark.parametrize("T", [0, 1, 30])
def test_all_experts_of_each_token(T, factor):
    case = Case(T, 8, E=6, each=5, P=6, K=9, integers=True, factor=factor)  # in any order
    check_expert_exactly(expert_topk, case)
    case.K = 50  # more columns than candidates
    check_expert_exactly(expert_topk, case)
    case.experts[::3, 2] = -1
    check_expert_exactly(expert_topk, case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("K", [4, 15, 20])
def test_by_neuron(dtype, K):
    check_by_neuron(expert_topk, Case(30, 8, E=6, each=5, P=3, K=K, dtype=dtype, integers=True))


def test_the_torch_path_has_no_limits():
    check_expert_exactly(expert_topk, Case(3, 4, E=1100, each=2, P=700, K=300, integers=True))


def test_nan_leads_to_no_index_that_is_not_there():
    check_nan(router_topk, expert_topk, row_union)


def test_with_router_topk_it_makes_the_picks_of_the_method():
    routing = pytest.importorskip("meft.routing.reference")
    g = generator()
    x, router, keys = (torch.randn(n, 24, generator=g, dtype=torch.float64) for n in (30, 8, 48))
    experts, factors = router_topk(x @ router.T, 3)
    ids, _, _ = expert_topk(x, keys, experts, factors, 5, E=8)
    chosen = routing.chosen_neurons(x, router, keys, experts_per_token=3, top_k=5, router_factor=True)
    mine = torch.zeros(30, 49, dtype=torch.bool).scatter_(1, ids.long().where(ids >= 0, 48), True)
    assert torch.equal(mine[:, :48], chosen)


def test_registration():
    case = Case(9, 8, E=5, each=4, P=3, K=4)
    arguments = (case.x, case.keys, case.experts, case.factors, case.K, case.E, False, None)
    torch.library.opcheck(_op, arguments)
    torch.library.opcheck(_op, (*arguments[:3], None, *arguments[4:6], True, None))
    compiled = torch.compile(lambda: case.run(expert_topk), fullgraph=True, backend="aot_eager")
    for out, again in zip(compiled(), case.run(expert_topk), strict=True):
        assert torch.equal(out, again)


def test_no_gradient_passes():
    case = Case(3, 8, E=5, each=4, P=3, K=4)
    for tensor in (case.x, case.keys, case.factors):
        tensor.requires_grad_()
    assert not any(out.requires_grad for out in case.run(expert_topk))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 8, 1)}, "x: two dimensions"),
        ({"x": torch.zeros(3, 8, dtype=torch.int64)}, "x: one of"),
        ({"keys": torch.zeros(20, 7)}, "keys: 8 columns are needed, not 7"),
        ({"keys": torch.zeros(8, 20).T}, "keys: a contiguous table"),
        ({"keys": torch.zeros(0, 8)}, "keys: has no rows"),
        ({"keys": torch.zeros(20, 8, device="meta")}, "keys: is on meta, but experts is on cpu"),
        ({"keys": torch.zeros(20, 8, dtype=torch.float64)}, "keys: torch.float64, but x is torch.float32"),
        ({"E": 6}, "E: 6 does not divide the 20 rows"),
        (
            {"keys": torch.zeros(20, 8, dtype=torch.bfloat16), "x": torch.zeros(3, 8).half()},
            "keys: torch.bfloat16, but x is",
        ),
        ({"E": 0}, "E: at least 1"),
        ({"experts": torch.zeros(3, 3)}, "experts: one of torch.int32, torch.int64"),
        ({"experts": torch.zeros(2, 3, dtype=torch.int32)}, "experts: 2 rows for 3 tokens"),
        ({"experts": torch.zeros(3, 6, dtype=torch.int32)}, "experts: 1 to E = 5 columns"),
        ({"factors": torch.zeros(3, 2)}, "factors: 3 columns are needed, not 2"),
        ({"K": 0}, "K: at least 1"),
        ({"impl": "triton"}, 'impl: "triton" needs CUDA tensors'),
        ({"impl": "cuda"}, "impl: .* not 'cuda'"),
    ],
)
def test_bad_input(change, message):
    case = Case(3, 8, E=5, each=4, P=3, K=4)
    arguments = {name: getattr(case, name) for name in ("x", "keys", "experts", "factors", "K", "E")}
    with pytest.raises(ValueError, match=message):
        expert_topk(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": torch.tensor([[0, 5, 1]])}, "experts: ids outside of -1 to 4"),
        ({"experts": torch.tensor([[0, 1, 0]])}, "experts: a token has an expert twice"),
        ({"factors": torch.full((1, 3), torch.nan)}, "factors: NaN"),
        ({"x": torch.full((1, 8), torch.nan)}, "x: NaN"),
    ],
)
def test_debug_mode_looks_at_values(change, message):
    case = Case(1, 8, E=5, each=4, P=3, K=4)
    arguments = {name: getattr(case, name) for name in ("x", "keys", "experts", "factors", "K", "E")} | change
    expert_topk(**arguments)
    with debugging(), pytest.raises(ValueError, match=message):
        expert_topk(**arguments)
