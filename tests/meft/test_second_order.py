"""Derivatives of derivatives through MEFT layers beside those of the oracle; what there is none of is refused."""

import pytest
import torch
from torch.autograd import forward_ad, gradgradcheck
from torch.autograd import functional as AF
from torch.utils.checkpoint import checkpoint

from meft.config import MEFTConfig
from meft.gradient.row_gradient import RowGradient
from meft.layer import MEFTLayer
from meft.routing.reference import reference
from tests.support.thread_streams import ThreadStreams

D, T = 8, 6
WAYS = {
    "in place": {},
    "copies": {"row_dtype": "float32"},
    "host": {"retrieval": "host"},
    "stream, refetch": {"retrieval": "stream", "backward_rows": "refetch"},
    "device-keys": {"retrieval": "device-keys"},
    "device-rows, refetch": {"retrieval": "device-rows", "backward_rows": "refetch"},
    "resident": {"placement": "device"},
}


def make(way="in place", **fields):
    """A layer around nothing, and its router, keys and values."""
    config = MEFTConfig(
        **(
            {"r": 24, "num_experts": 4, "experts_per_token": 2, "top_k": 5, "master_dtype": "float64"}
            | WAYS[way]
            | fields
        )
    )
    torch.manual_seed(0)
    layer = MEFTLayer(torch.nn.Linear(D, D, bias=False, dtype=torch.float64), D)
    layer.base_layer.weight.data.zero_()
    layer.update_layer("default", config)
    layer.set_adapter("default")
    if way not in ("in place", "copies"):
        layer.places["default"].engine.use(ThreadStreams())
    parameters = [layer.router("default"), *(table.rows for table in layer.tables("default"))]
    with torch.no_grad():
        for p in parameters:
            p.copy_(torch.randn(p.shape).to(p.dtype))
    return layer, parameters, config


def inputs(count=1):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(T, D, generator=generator, dtype=torch.float64) for _ in range(count)]


def oracle_of(parameters, config):
    def oracle(x, own=None):
        own = parameters if own is None else own
        fields = {"experts_per_token": config.probed, "top_k": config.top_k, "router_factor": config.router_factor}
        return reference(x, *own, **fields)

    return oracle


def loss_of(y):
    return y.sin().square().sum()


def whole(g):
    return g.to_dense() if isinstance(g, RowGradient) else g


def second(function, wanted, along):
    """Derivatives of <first derivatives, along>."""
    first = torch.autograd.grad(loss_of(function(wanted[0])), wanted, create_graph=True, materialize_grads=True)
    product = sum((g * v).sum() for g, v in zip(first, along, strict=True))
    return [*map(whole, first), *map(whole, torch.autograd.grad(product, wanted, allow_unused=True))]


TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("factor", [True, False], ids=["factor", "plain"])
@pytest.mark.parametrize("way", WAYS)
def test_all_second_derivatives_equal_the_oracles(way, factor, checkpointing):
    layer, parameters, config = make(way, router_factor=factor)
    (x,) = inputs()
    wanted = [x.requires_grad_(), *parameters]
    along = [torch.randn_like(p) for p in wanted]
    ours = second(lambda x: checkpoint(layer, x, use_reentrant=False) if checkpointing else layer(x), wanted, along)
    leaves = [p.detach().clone().requires_grad_() for p in wanted]
    theirs = second(lambda x: oracle_of(None, config)(x, leaves[1:]), leaves, along)
    if way == "copies":  # read in float32
        leaves = [leaves[0], leaves[1], *(p.float().double() for p in leaves[2:])]
    for a, b in zip(ours, theirs, strict=True):
        if b is None or a is None:
            assert a is None or not a.any()
            assert b is None or not b.any()
        else:
            torch.testing.assert_close(a, b, **(TOLERANCE if way != "copies" else {"rtol": 1e-4, "atol": 1e-4}))
    assert any(a.abs().max() > 1 for a in ours[4:] if a is not None)


@pytest.mark.parametrize("way", ["in place", "stream, refetch"])
def test_numbers_say_so_too(way):
    layer, parameters, _ = make(way)
    for p in parameters[1:]:
        p.requires_grad_(False)
    (x,) = inputs()
    x.requires_grad_()

    assert torch.autograd.gradcheck(lambda x: layer(x).tanh(), (x,))
    assert gradgradcheck(lambda x: layer(x).tanh(), (x,))


@pytest.mark.parametrize("way", ["in place", "copies", "host", "stream, refetch"])
def test_torchs_functions_of_functions(way):
    layer, parameters, config = make(way)
    if way == "copies":
        for p in parameters[1:]:
            p.data = p.data.float().double()
    oracle = oracle_of([p.detach() for p in parameters], config)
    x, v = inputs(2)

    def ours(x):
        return loss_of(layer(x))

    def theirs(x):
        return loss_of(oracle(x))

    for function in (AF.hvp, AF.vhp, AF.jvp):
        along = v
        torch.testing.assert_close(function(ours, x, along), function(theirs, x, along), **TOLERANCE)
    torch.testing.assert_close(AF.jvp(layer, x, v), AF.jvp(oracle, x, v), **TOLERANCE)
    torch.testing.assert_close(AF.jacobian(layer, x), AF.jacobian(oracle, x), **TOLERANCE)
    torch.testing.assert_close(AF.hessian(ours, x), AF.hessian(theirs, x), **TOLERANCE)
    for strict in (False, True):
        found = AF.hvp(ours, x, v, strict=strict)
        torch.testing.assert_close(found, AF.hvp(theirs, x, v), **TOLERANCE)


@pytest.mark.parametrize("way", ["in place", "host", "stream, refetch"])
def test_a_gradient_penalty_trains_the_rows(way):
    layer, parameters, config = make(way)
    (x,) = inputs()
    x.requires_grad_()
    leaves = [p.detach().clone().requires_grad_() for p in parameters]
    for function in (layer, lambda x: oracle_of(None, config)(x, leaves)):
        y = function(x)
        (slope,) = torch.autograd.grad(loss_of(y), x, create_graph=True)
        (loss_of(y) + slope.square().sum()).backward()
    for p, leaf in zip(parameters, leaves, strict=True):
        torch.testing.assert_close(whole(p.grad), leaf.grad, **TOLERANCE)
    for p in parameters[1:]:
        assert isinstance(p.grad, RowGradient)
        assert len(p.grad.rows) < len(p)


@pytest.mark.parametrize("way", ["in place", "host"])
def test_a_penalty_on_the_gradients_of_rows(way):
    layer, parameters, config = make(way)
    (x,) = inputs()
    leaves = [p.detach().clone().requires_grad_() for p in parameters]
    found = []
    for function, own in ((layer, parameters), (lambda x: oracle_of(None, config)(x, leaves), leaves)):
        first = torch.autograd.grad(loss_of(function(x)), own, create_graph=True)
        sum(g.square().sum() for g in first).backward()
        found.append([whole(p.grad) for p in own])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


def test_third_derivatives_by_inputs_are_right_and_by_rows_refused():
    layer, parameters, config = make()
    x, v = inputs(2)
    x.requires_grad_()
    oracle = oracle_of([p.detach() for p in parameters], config)
    found = []
    for function in (layer, oracle):
        g = loss_of(function(x))
        for _ in range(3):
            g = (torch.autograd.grad(g, x, create_graph=True)[0] * v).sum()
        found.append(g.detach())
    torch.testing.assert_close(*found, **TOLERANCE)
    (first,) = torch.autograd.grad(loss_of(layer(x)), parameters[1], create_graph=True)
    with pytest.raises(NotImplementedError, match="MEFT has no third derivatives by rows"):
        torch.autograd.grad(first.square().sum(), x, create_graph=True)


def in_a_dual_level(function, x, v):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, v))


REFUSED = {
    "grad": lambda f, x, v: torch.func.grad(lambda x: loss_of(f(x)))(x),
    "vjp": lambda f, x, v: torch.func.vjp(f, x),
    "jvp": lambda f, x, v: torch.func.jvp(f, (x,), (v,)),
    "vmap": lambda f, x, v: torch.func.vmap(f)(torch.stack([x, v])),
    "hessian": lambda f, x, v: torch.func.hessian(lambda x: loss_of(f(x)))(x),
    "jacrev": lambda f, x, v: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x, v: torch.func.jacfwd(f)(x),
    "linearize": lambda f, x, v: torch.func.linearize(f, x),
    "forward mode": in_a_dual_level,
    "jacobian, vectorize": lambda f, x, v: AF.jacobian(f, x, vectorize=True),
    "jacobian, forward mode": lambda f, x, v: AF.jacobian(f, x, vectorize=True, strategy="forward-mode"),
    "hessian, vectorize": lambda f, x, v: AF.hessian(lambda x: loss_of(f(x)), x, vectorize=True),
    "batched": lambda f, x, v: torch.autograd.grad(
        f(y := x.clone().requires_grad_()), y, torch.stack([x, v]), is_grads_batched=True
    ),
}


@pytest.mark.parametrize("way", ["in place", "copies", "host"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_there_is_none_of_is_one_sentence(name, way):
    layer, _, _ = make(way)
    with pytest.raises(NotImplementedError, match="MEFT") as raised:
        REFUSED[name](layer, *inputs(2))
    assert "\n" not in str(raised.value)
    x = inputs()[0].requires_grad_()  # and the layer goes on
    loss_of(layer(x)).backward()
    assert x.grad.any()


@pytest.mark.parametrize("which", ["router", "rows"])
def test_forward_mode_by_parameters_is_refused(which):
    layer, _, _ = make()
    (x,) = inputs()
    name = {"router": "meft_router.default.weight", "rows": "meft_keys.default.rows"}[which]
    with forward_ad.dual_level():
        value = layer.get_parameter(name).detach()
        dual = forward_ad.make_dual(value, torch.ones_like(value))
        with pytest.raises((NotImplementedError, RuntimeError), match="MEFT"):
            torch.func.functional_call(layer, {name: dual}, (x,))


def test_functional_call_with_another_router():
    layer, parameters, config = make()
    (x,) = inputs()
    router = torch.randn_like(parameters[0]).requires_grad_()
    y = torch.func.functional_call(layer, {"meft_router.default.weight": router}, (x,))
    expected = oracle_of(None, config)(x, [router, *parameters[1:]])
    torch.testing.assert_close(y, expected, **TOLERANCE)
    found = [torch.autograd.grad(loss_of(out), router)[0] for out in (y, expected)]
    torch.testing.assert_close(*found, **TOLERANCE)


@pytest.mark.parametrize("fields", [{}, {"retrieval": "stream"}], ids=["in place", "stream"])
def test_a_step_after_backward_with_a_graph(tiny, fields):
    """The same rows, moments and router as without the graph."""
    states = []
    for create_graph in (False, True):
        model = tiny.adapted(2, **fields)
        optimizer = tiny.adamw(model)
        for step in range(2):
            tiny.loss(model, step).backward(create_graph=create_graph)
            optimizer.step()
            optimizer.zero_grad()
        states.append(tiny.whole_state(model))
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-9, atol=1e-9, msg=name)
