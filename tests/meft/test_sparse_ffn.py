"""Outputs and all gradients of the sparse path against autograd through the oracle."""

import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_kernels import SelectedRows, row_union
from adapter_kernels.ffn import sparse_products
from adapter_kernels.ffn.sparse_products import ByColumn, entry_dots, line_sums
from meft.gradient.row_gradient import RowGradient
from meft.retrieval.second_order import AsRowGradient
from meft.retrieval.sparse_ffn import SparseFFN
from meft.retrieval.types import GatheredRows, PendingForward, Selection
from meft.routing.reference import chosen_neurons, reference
from meft.routing.topk import select_neurons

SIZES = {"T": 11, "d": 6, "E": 4, "each": 5, "P": 2, "K": 4}


@pytest.fixture(params=["sparse products", "masked products"])
def products(request, monkeypatch):
    """Both ways to sum over picks: MKL's sparse products, and dense ones with a mask where there is no MKL."""
    if request.param == "masked products":
        monkeypatch.setattr(sparse_products, "has_sparse_products", lambda tensor: False)
    elif not torch.backends.mkl.is_available():
        pytest.skip("this torch was built without MKL")


class Dense(torch.autograd.Function):
    """A table unchanged; its gradient of rows becomes a plain tensor on the way to the leaf."""

    @staticmethod
    def forward(ctx, table):
        return table.view_as(table)

    @staticmethod
    def backward(ctx, g):
        assert isinstance(g, RowGradient)
        return g.to_dense()


def draw(T=11, d=6, E=4, each=5, seed=0, **_):
    """x, router, keys, values and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((T, d), (E, d), (E * each, d), (E * each, d), (T, d))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


class Tables:
    """What an autograd function asks of a layer."""

    def __init__(self, keys, values):
        self.rows = keys, values
        self.keys = self.values = SimpleNamespace(lock=threading.RLock())
        self.choice = None

    @property
    def versions(self):
        return tuple(rows._version for rows in self.rows)


class Receiver:
    """Takes gradients as rows of their tables."""

    def send_back(self, pending, which, gradient):
        return RowGradient(pending.known.host_rows, gradient, pending.layer.rows[which])

    def keep_graph(self, pending, which, gradient):
        return AsRowGradient.apply(gradient, pending.known.host_rows, pending.layer.rows[which])


def picks_of(x, logits, keys, P, K, factor):
    """Ids and x . w of the picks, [T, K]."""
    found = select_neurons(x, logits, keys, SimpleNamespace(probed=P, top_k=K, router_factor=factor))
    return found.ids, found.dots


def ffn(x, router, keys, values, picks, factor=True, in_place=True, read=None, done=lambda: None):
    """The autograd function as the engine calls it, of given picks. read: the rows, if they are not the tables'."""
    ids, dots = picks
    key_rows, value_rows = (t.detach() for t in (read if read is not None else (keys, values)))
    rows, inverse = row_union(ids, len(keys))
    logits = torch.nn.functional.linear(x, router.to(x.dtype))
    expert = torch.div(ids.clamp_min(0), len(keys) // len(router), rounding_mode="floor").long()
    scores = (dots * logits.detach().gather(1, expert) if factor else dots).relu()
    selection = Selection(rows, inverse, rows.long(), picks=SelectedRows(ids, scores, dots, rows, rows, inverse))
    if in_place:
        gathered = GatheredRows(key_rows.to(x.dtype), value_rows.to(x.dtype), ids, scores=scores)
    else:
        gathered = GatheredRows(key_rows[rows.long()].to(x.dtype), value_rows[rows.long()].to(x.dtype), inverse)
    tables = Tables(keys, values)
    pending = PendingForward(tables, selection, None, tables.versions, False)
    factors, idle = (logits.gather(1, expert), None) if factor else (None, logits)
    return SparseFFN.apply(x, factors, idle, keys, values, gathered, pending, Receiver(), x.dtype, done)


def sparse(x, router, keys, values, P, K, factor=True, in_place=True, read=None):
    """The sparse path as a layer calls it."""
    logits = (x @ router.to(x.dtype).T).detach()
    scored = (read[0] if read is not None else keys).detach()
    return ffn(x, router, keys, values, picks_of(x.detach(), logits, scored, P, K, factor), factor, in_place, read)


def gradients(y, g, inputs):
    found = torch.autograd.grad(y, inputs, g, allow_unused=True)
    return [torch.zeros_like(i) if t is None else t for t, i in zip(found, inputs, strict=True)]


def dense(t):
    return t.to_dense() if isinstance(t, RowGradient) else t


def assert_equal_to_the_oracle(sizes, seed, factor, in_place):
    *inputs, g = draw(**sizes, seed=seed)
    inputs = [t.requires_grad_() for t in inputs]
    P, K = sizes["P"], sizes["K"]
    y = sparse(*inputs, P, K, factor, in_place)
    expected = reference(*inputs, experts_per_token=P, top_k=K, router_factor=factor)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = gradients(y, g, inputs), gradients(expected, g, inputs)
    assert [type(t) for t in ours] == [torch.Tensor, torch.Tensor, RowGradient, RowGradient]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(dense(a), b, rtol=1e-12, atol=1e-12)
    return ours


@pytest.mark.parametrize("in_place", [True, False], ids=["tables", "copies"])
@pytest.mark.parametrize("factor", [True, False], ids=["factor", "plain"])
def test_float64_equals_the_oracle(products, factor, in_place):
    *_, dkeys, dvalues = assert_equal_to_the_oracle(SIZES, 0, factor, in_place)
    assert torch.equal(dkeys.rows, dvalues.rows)
    assert bool((dkeys.rows.diff() > 0).all())


@settings(deadline=None, max_examples=40)
@given(st.data(), st.booleans(), st.booleans())
def test_float64_equals_the_oracle_in_any_shape(data, factor, in_place):
    sizes = {name: data.draw(st.integers(1, most)) for name, most in (("T", 9), ("d", 7), ("E", 6), ("each", 5))}
    sizes["P"] = data.draw(st.integers(1, sizes["E"]))
    sizes["K"] = data.draw(st.integers(1, sizes["E"] * sizes["each"]))
    assert_equal_to_the_oracle(sizes, data.draw(st.integers(0, 2**32)), factor, in_place)


@pytest.mark.parametrize("in_place", [True, False], ids=["tables", "copies"])
def test_the_dense_configuration_is_a_relu_adapter(products, in_place):
    x, router, keys, values, g = draw(seed=1)
    inputs = [t.requires_grad_() for t in (x, router, keys, values)]
    y = sparse(*inputs, P=4, K=20, factor=False, in_place=in_place)
    expected = (x @ keys.T).relu() @ values
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    for a, b in zip(gradients(y, g, inputs), gradients(expected, g, inputs), strict=True):
        torch.testing.assert_close(dense(a), b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("in_place", [True, False], ids=["tables", "copies"])
@pytest.mark.parametrize("T", [0, 3])
def test_nothing_picked_is_zero_with_zero_gradients(products, T, in_place):
    x, router, keys, values, g = draw(T=T, seed=2)
    inputs = [t.requires_grad_() for t in (x, router, keys, values)]
    nobody = torch.full((T, 4), -1, dtype=torch.int32), x.new_zeros(T, 4)
    y = ffn(*inputs, nobody, in_place=in_place)
    assert torch.equal(y, torch.zeros(T, 6, dtype=torch.float64))
    dx, drouter, dkeys, dvalues = gradients(y, g, inputs)
    assert not dx.any()
    assert not drouter.any()
    assert len(dkeys.rows) == len(dvalues.rows) == 0
    assert dkeys.row_values.shape == (0, 6)
    assert dkeys.shape == keys.shape


def test_some_tokens_without_picks(products):
    x, router, keys, values, g = draw(seed=3)
    x = x.clone()
    x[[0, 4, 10]] = 0
    inputs = [t.requires_grad_() for t in (x, router, keys, values)]
    y = sparse(*inputs, P=2, K=3)
    expected = reference(*inputs, experts_per_token=2, top_k=3)
    assert not y[[0, 4, 10]].any()
    for a, b in zip(gradients(y, g, inputs), gradients(expected, g, inputs), strict=True):
        torch.testing.assert_close(dense(a), b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("in_place", [True, False], ids=["tables", "copies"])
@pytest.mark.parametrize("factor", [True, False], ids=["factor", "plain"])
def test_gradcheck(products, factor, in_place):
    x, router, keys, values, _ = draw(T=5, d=3, seed=4)
    inputs = [t.requires_grad_() for t in (x, router, keys, values)]
    with torch.no_grad():
        ids, _ = picks_of(x, x @ router.T, keys, 2, 4, factor)

    def run(x, router, keys, values):
        # Dots of these inputs, which gradcheck moves.
        dots = (x.detach()[:, None] * keys.detach()[ids.long().clamp_min(0)]).sum(2).where(ids >= 0, 0)
        return ffn(x, router, Dense.apply(keys), Dense.apply(values), (ids, dots), factor, in_place)

    assert torch.autograd.gradcheck(run, inputs)


def test_only_what_is_asked_for_is_computed():
    x, router, keys, values, g = draw(seed=5)
    for wanted in range(4):
        inputs = [t.clone().requires_grad_(i == wanted) for i, t in enumerate((x, router, keys, values))]
        everything = [t.clone().requires_grad_() for t in (x, router, keys, values)]
        alone = torch.autograd.grad(sparse(*inputs, P=2, K=4), inputs[wanted], g)[0]
        together = torch.autograd.grad(sparse(*everything, P=2, K=4), everything, g)[wanted]
        assert torch.equal(dense(alone), dense(together))


# ---------------------------------------------------------------------- float32, and rows in bfloat16


@pytest.mark.parametrize("in_place", [True, False], ids=["tables", "copies"])
@pytest.mark.parametrize("factor", [True, False], ids=["factor", "plain"])
@pytest.mark.parametrize(("rows", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_float32_with_injected_picks(products, rows, bound, factor, in_place):
    """Against float64 with the same picks and the masters, so that the bound of bfloat16 holds the rows' rounding."""
    sizes = {"T": 64, "d": 32, "E": 8, "each": 16}
    x, router, keys, values, g = draw(**sizes, seed=6)
    exact = [t.clone().requires_grad_() for t in (x, router, keys, values)]
    chosen = chosen_neurons(x, router, keys, experts_per_token=3, top_k=12, router_factor=factor)
    expected = reference(*exact, experts_per_token=3, top_k=12, router_factor=factor, chosen=chosen)

    inputs = [t.float().requires_grad_() for t in (x, router, keys, values)]
    kept, ids = chosen.to(torch.int32).topk(12, dim=1)
    ids = ids.where(kept > 0, -1).int()
    read = [t.detach().to(rows) for t in inputs[2:]]
    dots = (inputs[0].detach()[:, None] * read[0].float()[ids.long().clamp_min(0)]).sum(2).where(ids >= 0, 0)
    y = ffn(*inputs, (ids, dots), factor, in_place, read)
    assert y.dtype == torch.float32
    pairs = [(y, expected), *zip(gradients(y, g.float(), inputs), gradients(expected, g, exact), strict=True)]
    for ours, theirs in pairs:
        error = dense(ours).double() - theirs
        assert error.norm() <= bound * theirs.norm()
        assert error.abs().max() <= 4 * bound * theirs.abs().max()  # no element hides behind the norm
    assert pairs[3][0].row_values.dtype == torch.float32


def test_bfloat16_rows_are_the_only_error():
    """Against float64 with the same rounded rows the path is as exact as with float32 rows."""
    x, router, keys, values, g = draw(T=64, d=32, E=8, each=16, seed=7)
    rounded = [keys.bfloat16(), values.bfloat16()]
    exact = [t.clone().requires_grad_() for t in (x.float().double(), router.float().double(), *map(_wide, rounded))]
    inputs = [t.detach().float().requires_grad_() for t in exact]
    y = sparse(*inputs, P=8, K=128, factor=False, read=rounded)
    expected = reference(*exact, experts_per_token=8, top_k=128, router_factor=False)
    pairs = [(y, expected), *zip(gradients(y, g.float(), inputs), gradients(expected, g, exact), strict=True)]
    for i in (0, 1, 3, 4):  # not the router: it has no gradient here
        ours, theirs = pairs[i]
        assert (dense(ours).double() - theirs).norm() <= 1e-6 * theirs.norm()


def _wide(t):
    return t.double()


# ---------------------------------------------------------------------- what a backward pass may rely on


def test_rows_updated_between_forward_and_backward_are_an_error():
    for changed in (2, 3):
        x, router, keys, values, g = draw(seed=8)
        inputs = [t.requires_grad_() for t in (x, router, keys, values)]
        y = sparse(*inputs, P=2, K=4)
        with torch.no_grad():
            inputs[changed].mul_(1.0)
        with pytest.raises(RuntimeError, match="rows were updated between this forward pass and its backward pass"):
            y.backward(g)
        assert all(t.grad is None for t in inputs)


def test_copies_outlive_an_update_of_the_tables():
    x, router, keys, values, g = draw(seed=8)
    inputs = [t.requires_grad_() for t in (x, router, keys, values)]
    expected = gradients(sparse(*inputs, P=2, K=4), g, inputs)
    y = sparse(*inputs, P=2, K=4, in_place=False)
    with torch.no_grad():
        keys.zero_()
        values.zero_()
    for a, b in zip(gradients(y, g, inputs), expected, strict=True):
        torch.testing.assert_close(dense(a), dense(b), rtol=1e-13, atol=1e-13)


def test_copies_are_saved_through_autograd_and_whole_tables_are_not():
    for in_place in (True, False):
        x, router, keys, values, _ = draw(T=33, E=8, seed=9)
        inputs = [t.requires_grad_() for t in (x, router, keys, values)]
        logits = (x @ router.T).detach()
        picks = picks_of(x.detach(), logits, keys.detach(), 1, 1, True)
        copy = (len(row_union(picks[0], len(keys))[0]), 6)
        assert copy not in (x.shape, router.shape, keys.shape)
        seen = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, seen=seen: seen.append(tuple(t.shape)) or t, lambda t: t
        ):
            ffn(*inputs, picks, in_place=in_place)
        assert seen.count(copy) == (0 if in_place else 2)
        assert tuple(keys.shape) not in seen


@pytest.mark.parametrize("needs_grad", [False, True])
def test_second_derivatives_equal_the_oracles(needs_grad):
    """Whether the gradient that comes in has a graph or not."""
    x, router, keys, values, g = draw(seed=10)
    inputs = [t.requires_grad_() for t in (x, router, keys, values)]
    g.requires_grad_(needs_grad)
    found = []
    for y in (sparse(*inputs, P=2, K=4), reference(*inputs, experts_per_token=2, top_k=4)):
        (dx,) = torch.autograd.grad(y, x, g, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), [*inputs, *([g] if needs_grad else [])]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(dense(a), b, rtol=1e-10, atol=1e-10)
    assert all(isinstance(a, RowGradient) for a in found[0][2:4])


def test_a_backward_pass_is_announced_once():
    x, router, keys, values, g = draw(seed=11)
    inputs = [t.requires_grad_() for t in (x, router, keys, values)]
    heard = []
    with torch.no_grad():
        picks = picks_of(x, x @ router.T, keys, 2, 4, False)
    y = ffn(*inputs, picks, factor=False, done=lambda: heard.append(True))
    assert heard == []
    y.backward(g)
    assert heard == [True]


# ---------------------------------------------------------------------- the products


@settings(deadline=None, max_examples=40)
@given(st.data(), st.booleans())
def test_the_products_over_picks_equal_loops(data, masked):
    T, r, d = (data.draw(st.integers(1, 6)) for _ in range(3))
    sets = [sorted(data.draw(st.sets(st.integers(0, r - 1)))) for _ in range(T)]
    starts = torch.tensor([0, *map(len, sets)]).cumsum(0)
    token = torch.tensor([t for t, s in enumerate(sets) for _ in s], dtype=torch.int64)
    neuron = torch.tensor([n for s in sets for n in s], dtype=torch.int64)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x, rows = (torch.randint(-3, 4, (n, d), generator=generator).double() for n in (T, r))
    weights = torch.randint(-3, 4, (len(token),), generator=generator).double()
    pairs = list(zip(token.tolist(), neuron.tolist(), weights.tolist(), strict=True))
    gathered, sums = torch.zeros(T, d, dtype=torch.float64), torch.zeros(r, d, dtype=torch.float64)
    for t, n, w in pairs:
        gathered[t] += w * rows[n]
        sums[n] += w * x[t]
    with pytest.MonkeyPatch.context() as patch:
        if masked:
            patch.setattr(sparse_products, "has_sparse_products", lambda tensor: False)
        assert torch.equal(line_sums(starts, neuron, token, weights, rows), gathered)
        assert entry_dots(starts, neuron, token, x, rows).tolist() == [float(x[t] @ rows[n]) for t, n, _ in pairs]
        assert torch.equal(ByColumn(neuron, token, r).sums(weights, x), sums)
