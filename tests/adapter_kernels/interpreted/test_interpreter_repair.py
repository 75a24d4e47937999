"""bf16 in the interpreter is what hardware computes, or an error; canaries are seen."""

import pytest
import torch
import triton
import triton.language as tl

from tests.support.kernels import kernel_checks


@triton.jit
def cast_kernel(source, target, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(target + i, tl.load(source + i).to(tl.float32).to(target.dtype.element_ty))


@triton.jit
def square_kernel(source, target, N: tl.constexpr, WIDEN: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(source + i)
    if WIDEN:
        value = value.to(tl.float32)
    tl.store(target + i, (value * value).to(target.dtype.element_ty))


@triton.jit
def product_kernel(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + m[:, None] * K + k[None, :])
    right = tl.load(b + k[:, None] * N + n[None, :])
    out = tl.dot(left, right, tl.zeros((M, N), tl.float32), input_precision="ieee")
    tl.store(c + m[:, None] * N + n[None, :], out.to(c.dtype.element_ty))


@triton.jit
def topk_kernel(source, ours, theirs, N: tl.constexpr, K: tl.constexpr):
    value = tl.load(source + tl.arange(0, N))
    tl.store(ours + tl.arange(0, K), tl.topk(value, K))
    tl.store(theirs + tl.arange(0, K), tl.standard.topk(value, K))


def test_fp32_to_bf16_rounds_as_torch_does():
    n = 1 << 15
    values = torch.randn(n, generator=torch.Generator().manual_seed(0)) * torch.logspace(-38, 38, n)
    values[:6] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1 + 2**-8])
    out = torch.empty(n, dtype=torch.bfloat16)
    cast_kernel[(1,)](values, out, N=n)
    assert torch.equal(out.view(torch.int16)[3:], values.bfloat16().view(torch.int16)[3:])
    assert torch.equal(out[:2], values[:2].bfloat16())
    assert out[2].isnan()


def test_a_product_of_bf16_tiles():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(32, 64, generator=generator).bfloat16()
    b = torch.randn(64, 16, generator=generator).bfloat16()
    out = torch.empty(32, 16, dtype=torch.bfloat16)
    product_kernel[(1,)](a, b, out, M=32, N=16, K=64)
    kernel_checks.assert_close(out, a.double() @ b.double(), a.double().abs() @ b.double().abs(), 64)


def test_arithmetic_on_bf16_must_widen_first():
    values = torch.randn(16, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.empty_like(values)
    square_kernel[(1,)](values, out, N=16, WIDEN=True)
    assert torch.equal(out, (values.float() ** 2).bfloat16())
    with pytest.raises(Exception, match="arithmetic on bf16"):
        square_kernel[(1,)](values, out, N=16, WIDEN=False)


def test_the_faster_topk_is_topk():
    values = torch.randint(-(2**62), 2**62, (128,), generator=torch.Generator().manual_seed(0))
    ours, theirs = torch.empty(2, 16, dtype=torch.int64)
    topk_kernel[(1,)](values, ours, theirs, N=128, K=16)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, values.sort(descending=True).values[:16])


def test_a_write_past_the_end_is_seen():
    kernel_checks.assert_canaries_work()
