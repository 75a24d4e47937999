"""router_topk on the CPU: the torch path against the oracle, its gradient, its registration, its errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapter_kernels import debugging, router_topk
from adapter_kernels.topk.router_topk import _op
from tests.support.kernels.kernel_checks import LAYOUTS
from tests.support.kernels.selection_checks import check_router, generator

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_oracle(dtype, layout):
    logits = (4 * torch.randn(37, 320, generator=generator())).round().to(dtype) / 4
    check_router(router_topk, LAYOUTS[layout](logits), 8)
    check_router(router_topk, logits[:0], 8)


@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, torch.inf, -torch.inf, torch.nan, -2.5]), min_size=1, max_size=20),
    st.data(),
)
def test_any_logits(row, data):
    check_router(router_topk, torch.tensor([row]), data.draw(st.integers(1, len(row))))


@pytest.mark.parametrize(("T", "E", "P"), [(1, 320, 8), (600, 5, 2), (3, 1100, 40), (30, 200, 200)])
def test_few_and_many(T, E, P):
    check_router(router_topk, (4 * torch.randn(T, E, generator=generator())).round(), P)


def test_gradient_goes_to_the_picked_logits():
    logits = torch.randn(5, 12, generator=generator(), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda values: router_topk(values, 4)[1], (logits,))
    experts, picked = router_topk(logits, 4)
    assert picked.requires_grad
    assert not experts.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration(dtype):
    logits = torch.randn(5, 12, generator=generator()).to(dtype).requires_grad_()
    torch.library.opcheck(_op, (logits, 4, None))
    compiled = torch.compile(lambda values: router_topk(values, 4)[1].sum(), fullgraph=True, backend="aot_eager")
    compiled(logits).backward()
    grad, logits.grad = logits.grad, None
    router_topk(logits, 4)[1].sum().backward()
    assert torch.equal(grad, logits.grad)


@pytest.mark.parametrize(
    ("logits", "P", "message"),
    [
        (torch.zeros(3), 1, "logits: two dimensions"),
        (torch.zeros(3, 4, dtype=torch.int32), 1, "logits: one of"),
        (torch.zeros(3, 0), 1, "logits: has no columns"),
        (torch.zeros(3, 4), 5, "P: 1 to 4 is needed, not 5"),
        (torch.zeros(3, 4), 0, "P: 1 to 4 is needed, not 0"),
    ],
)
def test_bad_input(logits, P, message):
    with pytest.raises(ValueError, match=message):
        router_topk(logits, P)


def test_nan_is_an_error_in_debug_mode():
    logits = torch.tensor([[0.0, torch.nan]])
    assert router_topk(logits, 1)[0].item() == 1
    with debugging(), pytest.raises(ValueError, match="logits: NaN at 1 tokens"):
        router_topk(logits, 1)
