"""expert_topk's kernels against the oracle in float64, in poisoned memory."""

import contextlib
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapter_kernels import expert_topk, override, router_topk, row_union
from tests.support.kernels import kernel_checks
from tests.support.kernels.selection_checks import (
    Case,
    check_by_neuron,
    check_expert,
    check_expert_exactly,
    check_nan,
    generator,
)

kernel = partial(expert_topk, impl="triton")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def long_tiles():
    """The interpreter's cost is by the operation, not by its size."""
    with contextlib.ExitStack() as stack:
        for suffix in ("", "_odd", "_fp32"):
            stack.enter_context(override(f"expert_topk.dots{suffix}", BK=1024))
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "d", "layout"),
    [(1, 4096, "contiguous"), (37, 576, "strided"), (5, 4100, "permuted")],
)
def test_scores_and_picks(fenced, dtype, T, d, layout):
    case = Case(T, d, E=6, each=23, P=4, K=20, dtype=dtype, layout=layout)
    differing, picks = check_expert(kernel, case)
    assert picks == 20 * T
    assert differing <= 0.01 * picks


def test_many_tokens(fenced):
    differing, picks = check_expert(kernel, Case(512, 40, E=5, each=8, P=2, K=3, dtype=torch.bfloat16))
    assert picks > 1500
    assert differing <= 0.01 * picks


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_on_integers_with_ties(fenced, dtype):
    check_expert_exactly(kernel, Case(37, 12, E=7, each=5, P=3, K=6, dtype=dtype, integers=True))


def test_tiles_as_they_are_launched(fenced):
    with override("expert_topk.dots", BK=128), override("expert_topk.dots_odd", BK=64):
        for d in (304, 300):
            check_expert_exactly(kernel, Case(20, d, E=2, each=3, P=1, K=3, dtype=torch.float16, integers=True))
    with override("expert_topk.dots_fp32", BK=32):
        check_expert_exactly(kernel, Case(20, 100, E=2, each=3, P=1, K=3, integers=True))


def test_without_factor_and_more_columns_than_candidates(fenced):
    check_expert_exactly(kernel, Case(3, 8, E=4, each=2, P=2, K=70, integers=True, factor=False))


def test_more_neurons_an_expert_than_a_tile(fenced):
    check_expert_exactly(kernel, Case(2, 8, E=2, each=130, P=2, K=70, integers=True))


def test_all_tokens_at_one_expert(fenced):
    case = Case(150, 8, E=3, each=4, P=1, K=4, integers=True)
    case.experts.fill_(1)
    check_expert_exactly(kernel, case)


def test_none_and_padding(fenced):
    check_expert_exactly(kernel, Case(0, 8, E=3, each=4, P=1, K=4))
    case = Case(9, 8, E=5, each=4, P=3, K=4, integers=True)
    case.experts[::2] = -1
    case.experts[1, 1] = 7  # not an expert: probes nothing
    check_expert_exactly(kernel, case)
    assert bool((case.run(kernel)[0][::2] == -1).all())


def test_infinite_and_nan_factors_pick_no_neuron_that_is_not_there(fenced):
    case = Case(6, 8, E=5, each=4, P=3, K=4, integers=True)
    case.factors[:] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    check_expert_exactly(kernel, case)


def test_nan_leads_to_no_index_that_is_not_there(fenced):
    check_nan(*(partial(op, impl="triton") for op in (router_topk, expert_topk, row_union)))


def test_by_neuron(fenced):
    check_by_neuron(kernel, Case(4, 8, E=5, each=4, P=3, K=9, integers=True))


@given(st.data())
def test_any_shape_with_ties(data):
    E, T = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 4))
    case = Case(
        T,
        d=data.draw(st.integers(1, 20)),
        E=E,
        each=data.draw(st.integers(1, 9)),
        P=data.draw(st.integers(1, E)),
        K=data.draw(st.integers(1, 12)),
        dtype=data.draw(st.sampled_from(DTYPES)),
        factor=data.draw(st.booleans()),
        integers=True,
        seed=data.draw(st.integers(0, 1000)),
    )
    if case.factors is not None and T and data.draw(st.booleans()):
        case.factors[0, 0] = data.draw(st.sampled_from([torch.inf, -torch.inf, 0.0]))
    case.experts[torch.rand(case.experts.shape, generator=generator()) < 0.2] = -1
    with pytest.MonkeyPatch.context() as patch, kernel_checks.fenced_memory(patch):
        check_expert_exactly(kernel, case)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case(1, 4, E=2, each=600, P=2, K=4), "experts: 2 experts of 600 neurons are more than 1024 candidates"),
        (Case(1, 4, E=2, each=4, P=2, K=257), "K: at most 256 is possible, not 257"),
        (Case(1, 1, E=1024, each=1025, P=1, K=1), "experts: 1 experts of 1025 neurons"),
        (Case(1, 1, E=1025, each=1, P=1, K=1), "E: the Triton kernel takes 1 to 1024, not 1025"),
        (Case(1, 4, E=2, each=4, P=2, K=4, dtype=torch.float64), "x: the Triton kernel has no torch.float64"),
    ],
    ids=["candidates", "picks", "candidates of one", "experts", "dtype"],
)
def test_limits_of_the_kernels(case, message):
    with pytest.raises(ValueError, match=message):
        case.run(kernel)


def test_keys_of_another_dtype_are_refused():
    case = Case(1, 4, E=2, each=4, P=2, K=4)
    case.keys = case.keys.bfloat16()
    with pytest.raises(ValueError, match=r"keys: torch\.bfloat16, but x is torch\.float32: the Triton kernel"):
        case.run(kernel)
