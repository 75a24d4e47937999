"""router_topk's kernel against the oracle: exact, in poisoned memory, whatever the logits."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapter_kernels import debugging, router_topk
from tests.support.kernels import kernel_checks
from tests.support.kernels.kernel_checks import LAYOUTS
from tests.support.kernels.selection_checks import check_router, generator

kernel = partial(router_topk, impl="triton")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("T", "E", "P"), [(1, 1, 1), (37, 320, 8), (2, 1000, 32)])
def test_equals_the_oracle(fenced, dtype, layout, T, E, P):
    # Quarters, so that there are ties in every dtype.
    logits = (4 * torch.randn(T, E, generator=generator())).round().to(dtype) / 4
    check_router(kernel, LAYOUTS[layout](logits), P)


def test_many_tokens_and_none(fenced):
    check_router(kernel, torch.randn(512, 64, generator=generator()).bfloat16(), 2)
    check_router(kernel, torch.randn(0, 64), 2)


@given(st.data())
def test_any_logits(data):
    E = data.draw(st.integers(1, 40))
    P = data.draw(st.integers(1, min(E, 32)))
    special = [0.0, -0.0, 1.0, -1.0, 6e-5, torch.inf, -torch.inf, torch.nan, -torch.nan]
    values = st.sampled_from(special) | st.floats(-1e4, 1e4, width=16)
    rows = data.draw(st.lists(st.lists(values, min_size=E, max_size=E), max_size=3))
    logits = torch.tensor(rows, dtype=torch.float32).reshape(len(rows), E).to(data.draw(st.sampled_from(DTYPES)))
    with pytest.MonkeyPatch.context() as patch, kernel_checks.fenced_memory(patch):
        check_router(kernel, logits, P)


def test_nan_is_an_error_in_debug_mode():
    logits = torch.zeros(3, 4)
    logits[1, 2] = torch.nan
    with debugging(), pytest.raises(ValueError, match=r"logits: NaN at 1 tokens, the first of them \[1\]"):
        kernel(logits, 2)


@pytest.mark.parametrize(
    ("logits", "P", "message"),
    [
        (torch.zeros(3, 1025), 1, "logits: the Triton kernel takes 1 to 1024 experts .* not 1025; pass impl='torch'"),
        (torch.zeros(3, 100), 33, "P: the Triton kernel takes 1 to 32, not 33"),
        (torch.zeros(3, 4).double(), 1, "logits: the Triton kernel has no torch.float64"),
    ],
)
def test_limits_of_the_kernel(logits, P, message):
    with pytest.raises(ValueError, match=message):
        kernel(logits, P)
