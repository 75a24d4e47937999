"""sparse_ffn on the CPU: the torch path against the oracle, its gradient, its registration, its errors."""

import pytest
import torch

from adapter_kernels import debugging, override, sparse_ffn, sparse_ffn_backward
from adapter_kernels.ffn import sparse_ffn_plain, sparse_ffn_torch
from adapter_kernels.ffn.sparse_ffn import _backward_op, _op
from tests.support.kernels.ffn_checks import Case, check_ffn, check_wide_row_gradients
from tests.support.kernels.kernel_checks import LAYOUTS
from tests.support.kernels.selection_checks import generator

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("T", "d", "U", "K"), [(1, 576, 40, 40), (37, 100, 90, 9)])
@pytest.mark.parametrize("factor", [True, False])
def test_forward_and_backward(dtype, layout, T, d, U, K, factor):
    check_ffn(sparse_ffn, Case(T, d, U, K, dtype, layout=layout, factor=factor, base=factor, narrow=U == 90))


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_sparse_products(monkeypatch, dtype):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    check_ffn(sparse_ffn, Case(37, 100, 90, 9, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "d", "U", "K"), [(1, 576, 40, 40), (37, 100, 90, 9), (5, 48, 7, 12)])
@pytest.mark.parametrize("factor", [True, False])
def test_plain_products(monkeypatch, dtype, T, d, U, K, factor):
    case = Case(T, d, U, K, dtype, layout="strided", factor=factor, base=factor, narrow=True)
    for name in ("forward", "backward"):
        monkeypatch.setattr(sparse_ffn_torch, name, None)  # not called
    with override("sparse_ffn.plain", TOKENS=T):
        check_ffn(sparse_ffn, case)
        assert not sparse_ffn_plain.chosen(case.x[1:])
        case.position[:, 0] = U  # out of range: none
        y = case.run(sparse_ffn)[0]
        case.position[:, 0] = -1
        assert torch.equal(y, case.run(sparse_ffn)[0])
    assert not sparse_ffn_plain.chosen(case.x)


def test_plain_products_of_no_rows_or_picks():
    x, none, some = torch.ones(2, 8), torch.empty(0, 8), torch.ones(3, 8)
    position = torch.zeros(2, 4, dtype=torch.int32)
    with override("sparse_ffn.plain", TOKENS=1):
        assert torch.equal(sparse_ffn(x, none, none, position), torch.zeros(2, 8))
        assert torch.equal(sparse_ffn(x, some, some, position[:, :0], base=x), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factor", [True, False])
@pytest.mark.parametrize("plain", [True, False])
def test_row_gradients_in_float32(dtype, factor, plain):
    with override("sparse_ffn.plain", TOKENS=int(plain)):
        check_wide_row_gradients(None, Case(600, 24, 9, 9, dtype, layout="strided", factor=factor, narrow=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_row_gradients_are_never_narrowed(dtype):
    case = Case(5, 24, 7, 3, dtype)
    arguments = (case.g, case.x, case.keys, case.values, case.position, case.factors)
    grads = sparse_ffn_backward(*arguments, row_gradients=dtype)
    _, oracles = case.run(sparse_ffn)
    for name, grad in zip(("x", "keys", "values", "factors"), grads, strict=True):
        assert torch.equal(grad, oracles[name])


@pytest.mark.parametrize(("T", "U", "K"), [(0, 5, 3), (4, 0, 3), (4, 5, 0)])
def test_row_gradients_in_float32_of_no_tokens_rows_or_picks(T, U, K):
    case = Case(T, 24, U, K, torch.bfloat16)
    arguments = (case.g, case.x, case.keys, case.values, case.position, case.factors)
    dx, *rows, dfactors = sparse_ffn_backward(*arguments, row_gradients=torch.float32)
    assert torch.equal(dx, torch.zeros_like(case.x))
    assert torch.equal(dfactors, torch.zeros_like(case.factors))
    for grad in rows:
        assert grad.dtype == torch.float32
        assert torch.equal(grad, torch.zeros(U, 24))


def test_only_what_is_needed_is_given():
    case = Case(5, 24, 7, 3, factor=False)
    arguments = (case.g, case.x, case.keys, case.values, case.position, case.factors)
    whole = sparse_ffn_backward(*arguments)
    assert whole[3] is None
    for i in range(3):
        needs = [j == i for j in range(4)]
        made = sparse_ffn_backward(*arguments, needs=needs)
        assert torch.equal(made[i], whole[i])
        assert [grad is not None for grad in made] == needs
    assert sparse_ffn_backward(*arguments, needs=[False, False, False, True]) == (None,) * 4


def test_none():
    check_ffn(sparse_ffn, Case(5, 24, 5, 3, none=1.0))
    check_ffn(sparse_ffn, Case(5, 24, 5, 3, none=1.0, base=False, factor=False))


def test_no_tokens_rows_or_picks():
    x = torch.ones(2, 8, requires_grad=True)
    none, some = torch.empty(0, 8), torch.ones(3, 8)
    position = torch.zeros(2, 4, dtype=torch.int64)
    assert torch.equal(sparse_ffn(x, some, some, position[:, :0], base=x + 1), torch.full((2, 8), 2.0))
    assert sparse_ffn(x[:0], some, some, position[:0]).shape == (0, 8)
    sparse_ffn(x, none, none, position - 1).sum().backward()
    assert torch.equal(x.grad, torch.zeros(2, 8))


def test_all_picks_without_factor_are_a_dense_relu_adapter():
    g = generator()
    x, keys, values = (torch.randn(n, 16, generator=g, dtype=torch.float64) for n in (6, 10, 10))
    y = sparse_ffn(x, keys, values, torch.arange(10).expand(6, 10))
    torch.testing.assert_close(y, torch.relu(x @ keys.T) @ values)


@pytest.mark.parametrize("factor", [True, False])
def test_gradient(factor):
    case = Case(4, 5, 6, 3, torch.float64, factor=factor)
    inputs = [case.x, case.keys, case.values, case.base] + ([case.factors.double()] if factor else [])

    def run(x, keys, values, base, factors=None):
        return sparse_ffn(x, keys, values, case.position, factors, base=base)

    assert torch.autograd.gradcheck(run, [t.clone().requires_grad_() for t in inputs], fast_mode=True)


def test_gradient_of_a_router_comes_by_way_of_its_logits():
    case = Case(4, 5, 6, 3, torch.float64, none=0.0)
    logits = torch.randn(4, 2, generator=generator(), dtype=torch.float64, requires_grad=True)
    expert = case.position.long() // 3

    def run(logits):
        return sparse_ffn(case.x, case.keys, case.values, case.position, logits.gather(1, expert))

    assert torch.autograd.gradcheck(run, [logits], fast_mode=True)


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, True), (torch.bfloat16, False)])
def test_registration(dtype, factor):
    case = Case(7, 24, 9, 4, dtype, factor=factor, base=factor)
    tensors = [case.x, case.keys, case.values, case.position, case.factors]
    leaves = [t.clone().requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors]
    torch.library.opcheck(_op, (*leaves, case.base, None))
    for row_gradients in {dtype, torch.float32}:
        torch.library.opcheck(_backward_op, (case.g, *tensors, [True, True, False, factor], row_gradients, None))
    compiled = torch.compile(sparse_ffn, fullgraph=True, backend="aot_eager")
    for out, oracle in zip(case.run(compiled), case.run(sparse_ffn), strict=True):
        torch.testing.assert_close(out, oracle, rtol=0, atol=0)
    backward = torch.compile(sparse_ffn_backward, fullgraph=True, backend="aot_eager")
    made, oracles = (f(case.g, *tensors, row_gradients=torch.float32) for f in (backward, sparse_ffn_backward))
    torch.testing.assert_close(made, oracles, rtol=0, atol=0)


def test_nothing_of_tokens_by_rows_is_made():
    case = Case(50, 8, 400, 3)
    arguments = (case.x, case.keys, case.values, case.position, case.factors)
    sizes: list[int] = []
    with _Sizes(sizes):
        sparse_ffn_torch.forward(*arguments, case.base)
        sparse_ffn_torch.backward(case.g, *arguments, [True] * 4, torch.float32)
    assert len(sizes) > 20
    assert max(sizes) < 50 * 400 // 2


class _Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes how many elements each result has, a sparse one its values."""

    def __init__(self, sizes):
        super().__init__()
        self.sizes = sizes

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                dense = tensor.layout == torch.strided
                self.sizes.append(tensor.numel() if dense else tensor.values().numel())
        return out


X = torch.ones(3, 8)
ROWS = torch.ones(5, 8)
POSITION = torch.zeros(3, 2, dtype=torch.int32)
GOOD = {"x": X, "keys": ROWS, "values": ROWS, "position": POSITION}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X[0]}, "x: two dimensions"),
        ({"x": X.int()}, "x: one of"),
        ({"keys": ROWS.half()}, "keys: one of torch.float32"),
        ({"keys": ROWS[:, :7]}, "keys: 8 columns are needed, not 7"),
        ({"values": ROWS.T.contiguous().T}, "values: contiguous rows"),
        ({"values": ROWS[:4]}, "values: 4 rows, but 5 keys"),
        ({"position": POSITION.float()}, "position: one of"),
        ({"position": POSITION[:2]}, "position: 2 rows for 3 tokens"),
        ({"position": POSITION[:, :1].expand(3, 40000)}, "position: at most 32767"),
        ({"factors": torch.ones(3, 3)}, "factors: 2 columns are needed, not 3"),
        ({"factors": torch.ones(2, 2)}, "factors: 2 rows for 3 tokens"),
        ({"base": X.half()}, "base: one of torch.float32"),
        ({"keys": ROWS.double()}, "keys: one of torch.float32 is needed, not torch.float64"),
        ({"base": X[:2]}, "base: 2 rows for 3 tokens"),
        ({"keys": ROWS.to("meta")}, "keys: is on meta, but position is on cpu"),
        ({"impl": "triton"}, "impl: "),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        sparse_ffn(**(GOOD | change))


HALF = {name: value.bfloat16() if value.is_floating_point() else value for name, value in GOOD.items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (GOOD | {"g": X[:2]}, "g: 2 rows for 3 tokens"),
        (GOOD | {"g": X[:, :7]}, "g: 8 columns are needed, not 7"),
        (GOOD | {"g": X.half()}, "g: one of torch.float32"),
        (GOOD | {"g": X.double()}, "g: one of torch.float32 is needed, not torch.float64"),
        (GOOD | {"g": X.to("meta")}, "g: is on meta, but x is on cpu"),
        (GOOD | {"g": X, "values": ROWS[:4]}, "values: 4 rows, but 5 keys"),
        (
            HALF | {"g": X.bfloat16(), "row_gradients": torch.float16},
            r"row_gradients: .* None or torch\.bfloat16 or torch\.float32 is needed, not torch\.float16",
        ),
        (
            GOOD | {"g": X, "row_gradients": torch.bfloat16},
            r"row_gradients: of rows of torch\.float32 None or torch\.float32 is needed, not torch\.bfloat16",
        ),
    ],
)
def test_bad_input_backward(arguments, message):
    with pytest.raises(ValueError, match=message):
        sparse_ffn_backward(**arguments)


def test_positions_are_looked_at_in_debug_mode():
    with debugging():
        with pytest.raises(ValueError, match="position: a token picks a row twice"):
            sparse_ffn(**GOOD)
        with pytest.raises(ValueError, match="position: rows outside of -1 to 4"):
            sparse_ffn(**(GOOD | {"position": POSITION + 5}))
