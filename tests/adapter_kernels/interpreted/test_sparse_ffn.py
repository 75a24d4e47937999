"""sparse_ffn's kernels against the oracle, in poisoned memory."""

import contextlib
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_kernels import override, sparse_ffn
from tests.support.kernels import kernel_checks
from tests.support.kernels.ffn_checks import Case, check_ffn, check_wide_row_gradients

kernel = partial(sparse_ffn, impl="triton")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def long_tiles():
    """The interpreter's cost is by the operation, not by its size."""
    with contextlib.ExitStack() as stack:
        for suffix in ("", "_fp32"):
            for name, blocks in (("forward", {"BK": 2048}), ("backward", {"BK": 2048}), ("product", {"BN": 1024})):
                stack.enter_context(override(f"sparse_ffn.{name}{suffix}", **blocks))
        stack.enter_context(override("sparse_ffn.token_scores", BR=64))
        stack.enter_context(override("sparse_ffn.token_values", BN=1024))
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "d", "U", "K", "layout"),
    [(1, 4096, 40, 40, "contiguous"), (37, 576, 90, 9, "strided"), (18, 4100, 33, 33, "permuted")],
)
def test_forward_and_backward(fenced, dtype, T, d, U, K, layout):
    check_ffn(kernel, Case(T, d, U, K, dtype, layout=layout))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("d", "layout", "factor"),
    [(32, "contiguous", True), (24, "strided", False)],
    ids=["factor", "unaligned, no factor"],
)
def test_row_gradients_in_float32(fenced, dtype, d, layout, factor):
    check_wide_row_gradients("triton", Case(256, d, 9, 9, dtype, layout=layout, factor=factor))


def test_many_tokens(fenced):
    with contextlib.ExitStack() as stack:
        for name in ("forward", "backward", "product"):
            stack.enter_context(override(f"sparse_ffn.{name}", BM=512))
        check_ffn(kernel, Case(512, 40, 33, 5, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_as_they_are_launched(fenced, dtype):
    single = dtype == torch.float32
    names = [f"sparse_ffn.{name}{'_fp32' if single else ''}" for name in ("forward", "backward", "product")]
    with override(names[0], BK=64), override(names[1], BK=64), override(names[2], BN=64, BK=64):
        check_ffn(kernel, Case(66, 70, 130, 5, dtype, narrow=True))
    with override("sparse_ffn.token_scores", BR=2, BK=64), override("sparse_ffn.token_values", BR=2, BN=64):
        check_ffn(kernel, Case(2, 100, 6, 5, dtype, narrow=True))


@pytest.mark.parametrize("T", [3, 20])
def test_one_row_all_rows_and_no_factor(fenced, T):
    check_ffn(kernel, Case(T, 48, 1, 1, factor=False, base=False, none=0.5))
    check_ffn(kernel, Case(T, 48, 64, 64, none=0.0, base=False))
    check_ffn(kernel, Case(T, 48, 7, 12, factor=False))


@pytest.mark.parametrize("T", [3, 20])
def test_none(fenced, T):
    check_ffn(kernel, Case(T, 24, 5, 3, none=1.0))
    check_ffn(kernel, Case(T, 24, 5, 3, none=1.0, base=False))


def test_no_tokens_rows_or_picks():
    x = torch.ones(2, 8, requires_grad=True)
    none, some = torch.empty(0, 8), torch.ones(3, 8)
    position = torch.zeros(2, 4, dtype=torch.int32)
    assert torch.equal(kernel(x, none, none, position - 1), torch.zeros(2, 8))
    assert torch.equal(kernel(x, some, some, position[:, :0], base=x + 1), torch.full((2, 8), 2.0))
    assert kernel(x[:0], some, some, position[:0]).shape == (0, 8)
    kernel(x, none, none, position - 1).sum().backward()
    assert torch.equal(x.grad, torch.zeros(2, 8))


def test_a_position_out_of_range_is_none(fenced):
    for T in (3, 20):
        case = Case(T, 24, 5, 3, none=0.0)
        case.position[:, 0] = 5
        y = case.run(kernel)[0]
        case.position[:, 0] = -1
        assert torch.equal(y, case.run(kernel)[0])


def test_only_what_needs_a_gradient_gets_one(fenced):
    case = Case(20, 24, 5, 3)
    _, whole = case.run(kernel)
    for name in ("x", "keys", "values", "factors"):
        leaves = {n: getattr(case, n).clone() for n in ("x", "keys", "values", "factors")}
        leaves[name].requires_grad_()
        kernel(leaves["x"], leaves["keys"], leaves["values"], case.position, leaves["factors"]).backward(case.g)
        assert torch.equal(leaves[name].grad, whole[name])


@settings(max_examples=4)
@given(st.data())
def test_any_shape(data):
    T, U = data.draw(st.sampled_from([1, 5, 17])), data.draw(st.integers(1, 9))
    case = Case(
        T,
        # Long rows: with few values a score may come out near zero, where its sign is a matter of rounding.
        d=data.draw(st.integers(20, 60)),
        U=U,
        K=data.draw(st.integers(1, 6)),
        dtype=data.draw(st.sampled_from(DTYPES)),
        factor=data.draw(st.booleans()),
        base=data.draw(st.booleans()),
        layout=data.draw(st.sampled_from(sorted(kernel_checks.LAYOUTS))),
    )
    with pytest.MonkeyPatch.context() as patch, kernel_checks.fenced_memory(patch):
        y, grads = case.run(kernel)
    oracle, oracles = case.oracle()
    for out, exact in [(y, oracle)] + [(grads[name], oracles[name]) for name in grads]:
        assert (out.double() - exact).norm() <= 10 * kernel_checks.IN_NORM[case.x.dtype] * (1 + exact.norm())


def test_what_the_kernels_do_not_take_is_named():
    case = Case(3, 24, 5, 3)
    with pytest.raises(ValueError, match=r"x: the Triton kernel has no torch\.float64; pass impl='torch'"):
        kernel(case.x.double(), case.keys.double(), case.values.double(), case.position)
    with pytest.raises(ValueError, match=r"factors: the Triton kernel has no torch\.float64"):
        kernel(case.x, case.keys, case.values, case.position, case.factors.double())
