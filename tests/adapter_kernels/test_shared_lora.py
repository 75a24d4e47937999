"""shared_lora on the CPU: the torch path against the oracle, its gradient, its registration, its errors."""

import pytest
import torch
from kernel_checks import LAYOUTS
from lora_checks import Case, check_lora

from adapter_kernels import shared_lora
from adapter_kernels.shared_lora import _backward_op, _op

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("T", "d", "r", "out"), [(1, 576, 8, [576, 64]), (37, 100, 70, [90]), (0, 9, 2, [3])])
def test_forward_and_backward(dtype, layout, T, d, r, out):
    check_lora(shared_lora, Case(T, d, r, out, dtype, layout=layout if T else "contiguous"))


@pytest.mark.parametrize("out", [[6, 3], [6]])
def test_gradient(out):
    case = Case(4, 5, 2, out, torch.float64)

    def run(x, A, *rest):
        return tuple(shared_lora(x, A, list(zip(rest[::2], rest[1::2], strict=True)), 0.7))

    assert torch.autograd.gradcheck(run, [t.clone().requires_grad_() for t in case.leaves.values()], fast_mode=True)


def test_one_output_that_is_not_used():
    case = Case(4, 5, 2, [6, 3])
    x, A, *rest = (t.clone().requires_grad_() for t in case.leaves.values())
    shared_lora(x, A, [(rest[0], rest[1]), (rest[2], rest[3])], 0.7)[0].sum().backward()
    alone = case.leaves["x"].clone().requires_grad_()
    shared_lora(alone, A, [(rest[0], rest[1])], 0.7)[0].sum().backward()
    torch.testing.assert_close(x.grad, alone.grad)


@pytest.mark.parametrize(("dtype", "out"), [(torch.float32, [6, 3]), (torch.bfloat16, [6])])
def test_registration(dtype, out):
    case = Case(4, 5, 2, out, dtype)
    x, A, base, B, base2, B2 = [t.clone().requires_grad_() for t in case.leaves.values()] + [None] * (4 - 2 * len(out))
    torch.library.opcheck(_op, (x, A, base, B, base2, B2, 0.7, None))
    h = torch.ones(4, 2)
    second = case.grads[1] if len(out) > 1 else None
    torch.library.opcheck(_backward_op, tuple(
        t.detach() if isinstance(t, torch.Tensor) else t for t in (x, A, h, case.grads[0], B, second, B2, 0.7, None)
    ))  # fmt: skip
    compiled = torch.compile(shared_lora, fullgraph=True, backend="aot_eager")
    results, expected = case.run(compiled), case.run(shared_lora)
    for name, value in expected.items():
        assert torch.equal(results[name], value), name


X = torch.ones(3, 8)
PAIR = (torch.ones(3, 5), torch.ones(5, 2))


@pytest.mark.parametrize(
    ("x", "A", "projections", "message"),
    [
        (X[0], X[:2], [PAIR], "x: two dimensions"),
        (X.int(), X[:2], [PAIR], "x: one of"),
        (X, X[:2, :7], [PAIR], "A: 8 columns are needed, not 7"),
        (X, X[:2].half(), [PAIR], "A: one of torch.float32"),
        (X, X[:2], [], "projections: one or two"),
        (X, X[:2], [PAIR] * 3, "projections: one or two"),
        (X, X[:1], [PAIR], r"projections\[0\]\[1\]: 1 columns are needed, not 2"),
        (X, X[:2], [PAIR, (torch.ones(3, 4), PAIR[1])], r"projections\[1\]\[0\]: 5 columns are needed, not 4"),
        (X, X[:2], [(torch.ones(2, 5), PAIR[1])], r"projections\[0\]\[0\]: 2 rows for 3 tokens"),
        (X, X[:2].to("meta"), [PAIR], "A: is on meta, but x is on cpu"),
    ],
)
def test_bad_input(x, A, projections, message):
    with pytest.raises(ValueError, match=message):
        shared_lora(x, A, projections, 1.0)
