"""shared_lora's kernels against the oracle, in poisoned memory."""

import contextlib
from functools import partial

import kernel_checks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_checks import Case, check_lora

from adapter_kernels import override, shared_lora

kernel = partial(shared_lora, impl="triton")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def long_tiles():
    """The interpreter's cost is by the operation, not by its size."""
    with contextlib.ExitStack() as stack:
        for suffix in ("", "_odd", "_fp32"):
            stack.enter_context(override(f"shared_lora.down{suffix}", BM=64, BK=1024))
        for suffix in ("", "_fp32"):
            stack.enter_context(override(f"shared_lora.up{suffix}", BM=64, BN=1024))
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "d", "r", "out", "layout"),
    [
        (1, 4096, 8, [4096, 1024], "contiguous"),
        (37, 576, 16, [576, 64], "strided"),
        (5, 4100, 33, [100], "permuted"),
    ],
)
def test_forward_and_backward(fenced, long_tiles, dtype, T, d, r, out, layout):
    check_lora(kernel, Case(T, d, r, out, dtype, layout=layout))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_as_they_are_launched(fenced, dtype):
    check_lora(kernel, Case(40, 200, 9, [140, 70], dtype))
    check_lora(kernel, Case(40, 208, 9, [144], dtype))


def test_many_tokens_and_none(fenced, long_tiles):
    check_lora(kernel, Case(512, 24, 4, [24, 8], torch.bfloat16))
    check_lora(kernel, Case(0, 24, 4, [24, 8]))


def test_a_rank_past_the_limit():
    with pytest.raises(ValueError, match="A: rank 65 is more than 64"):
        Case(2, 8, 65, [8]).run(kernel)


@settings(max_examples=8)
@given(st.data())
def test_any_shape(data):
    size = st.integers(1, 40)
    out = data.draw(st.lists(size, min_size=1, max_size=2))
    case = Case(
        data.draw(size),
        data.draw(size),
        data.draw(st.integers(1, 20)),
        out,
        data.draw(st.sampled_from(DTYPES)),
        layout=data.draw(st.sampled_from(sorted(kernel_checks.LAYOUTS))),
    )
    with pytest.MonkeyPatch.context() as patch, kernel_checks.fenced_memory(patch):
        check_lora(kernel, case)
