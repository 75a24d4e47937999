"""Layers that read one x and one A share their product: when, with which values and gradients, and for how long."""

import copy
import gc
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from aslora import ASLoRAConfig
from peft_bridge.torch_private import TorchDispatchMode

LAYERS, WIDTH = 3, 6


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, out) for out in (6, 4, 4))
        self.o = nn.Linear(4, WIDTH)

    def forward(self, x):
        y = x.tanh()
        return x + self.o(self.q(y)[..., :4] * self.k(y) + self.v(y))


class Net(nn.Module):
    """Blocks that run one after the other, each through `run`."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.run = lambda block, x: block(x)

    def forward(self, x):
        for block in self.layers:
            x = self.run(block, x)
        return x


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return Net().to(dtype)


def adapted(dtype=torch.float64, **fields):
    defaults = {"r": 2, "lora_alpha": 4, "target_modules": ["q", "k", "v"], "share_a": "joint", "init_weights": False}
    return get_peft_model(net(dtype), ASLoRAConfig(**(defaults | fields)))


def inputs(dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(2, 5, WIDTH, dtype=dtype, requires_grad=True)


def the_a(model):
    (A,) = model.base_model.shared_a("default").values()
    return A


def block(model, layer=1):
    return model.get_base_model().layers[layer]


class Products(TorchDispatchMode):
    """Counts the matrix products of one operand."""

    def __init__(self, operand):
        super().__init__()
        self.operand, self.count = operand, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.count += any(arg.data_ptr() == self.operand.data_ptr() for arg in args)
        return func(*args, **(kwargs or {}))


def products(model, run):
    with Products(the_a(model).shared_A) as counter:
        run()
    return counter.count


def apart():
    """Hooks that change nothing on what the graph saves: no product is shared under them."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize(
    ("fields", "evaluate", "expected"),
    [
        ({}, False, LAYERS),
        ({"aslora_dropout": 0.5}, False, 3 * LAYERS),  # each layer has a mask of its own
        ({"aslora_dropout": 0.5}, True, LAYERS),
        ({"target_modules": ["q"]}, False, LAYERS),
    ],
)
def test_one_product_and_one_gradient_of_it_a_layer(fields, evaluate, expected):
    model, x = adapted(**fields).train(not evaluate), inputs()
    outputs = []
    assert products(model, lambda: outputs.append(model(x))) == expected
    assert products(model, outputs[0].sum().backward) == expected
    with apart():
        assert products(model, lambda: model(x)) == len(model.targeted_module_names)


@pytest.mark.parametrize("lora_alpha", [2, 4, 6], ids=lambda alpha: f"scaling {alpha / 2}")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_equal_to_lora_with_tied_a_and_to_products_of_their_own(lora_alpha, dtype):
    """To the last bit in the forward pass; the sum of gradients may have another order."""
    model = adapted(dtype, lora_alpha=lora_alpha)
    lora = get_peft_model(net(dtype), LoraConfig(r=2, lora_alpha=lora_alpha, target_modules=["q", "k", "v"]))
    for name, layer in model.named_modules():
        if name.endswith((".q", ".k", ".v")):
            A, B = layer.factors("default")
            twin = lora.get_submodule(name)
            with torch.no_grad():
                twin.lora_A["default"].weight.copy_(A)
                twin.lora_B["default"].weight.copy_(B)
    x = inputs(dtype)
    shared, theirs = model(x), lora(x)
    with apart():
        own = model(x)
    assert shared.dtype == dtype
    assert torch.equal(shared, own)
    assert torch.equal(shared, theirs)
    ours, each = (gradients(model, output.float().square().sum()) for output in (shared, own))
    tolerances = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.05}
    for name in ours:
        torch.testing.assert_close(ours[name], each[name], **tolerances)
    theirs.float().square().sum().backward()
    summed = sum(p.grad for name, p in lora.named_parameters() if "lora_A" in name)
    torch.testing.assert_close(the_a(model).shared_A.grad, summed, **tolerances)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_large_scaling_in_float16_is_applied_where_lora_applies_it(autocast):
    """The product with A times 16 would be inf."""
    dtype = torch.float32 if autocast else torch.float16
    config = ASLoRAConfig(r=2, lora_alpha=32, target_modules=["q", "k"], share_a="joint")
    layer = block(get_peft_model(net(dtype), config, autocast_adapter_dtype=False)).q
    x = 60 * inputs(dtype)
    with torch.no_grad():
        A, B = layer.factors("default")
        A.fill_(60.0)
        B.copy_(1e-3 * torch.randn(B.shape, generator=torch.Generator().manual_seed(0)))
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            xA = nn.functional.linear(x, A)
            expected = layer.base_layer(x) + nn.functional.linear(xA, B) * 16
            assert not (xA * 16).isfinite().all()
            assert expected.isfinite().all()
            assert torch.equal(layer(x), expected)


def test_derivatives_by_finite_differences():
    """First and second, with respect to A and the input of layers that share their product."""
    model = adapted(lora_alpha=6)
    layers, x, A = block(model), inputs()[:1, :2].detach().requires_grad_(), the_a(model).shared_A
    taken = []

    def outputs(x, _):
        y = x.tanh()
        first = layers.q(y)
        taken.append(products(model, lambda: taken.append(layers.v(y))))
        return first.sin().sum() + taken[-2].square().sum()

    assert torch.autograd.gradcheck(outputs, (x, A))
    assert taken[1] == 0
    taken.clear()
    assert torch.autograd.gradgradcheck(outputs, (x, A))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant):
    model, x = adapted(), inputs()
    expected = gradients(model, model(x).square().sum())
    model.get_base_model().run = lambda block, x: checkpoint(block, x, use_reentrant=use_reentrant)
    found = gradients(model, model(x).square().sum())
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-14)


def test_two_active_adapters_have_a_product_each():
    model, x = adapted(), inputs()
    model.add_adapter("other", ASLoRAConfig(r=3, target_modules=["q", "k"], share_a="joint", init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    layer, y = block(model).k, x.tanh()
    block(model).q(y)
    deltas = layer.get_delta_weight("default") + layer.get_delta_weight("other")
    torch.testing.assert_close(layer(y), layer.base_layer(y) + y @ deltas.T, rtol=1e-12, atol=1e-14)


def test_transforms_of_torch_func():
    model, x = adapted(), inputs().detach()
    name = next(n for n, p in model.named_parameters() if p is the_a(model).shared_A)
    stack = torch.randn(3, 2, WIDTH, dtype=torch.float64)

    def call(A):
        return torch.func.functional_call(model, {name: A}, (x,))

    expected = torch.stack([call(A) for A in stack])
    torch.testing.assert_close(torch.func.vmap(call)(stack), expected, rtol=1e-12, atol=1e-14)
    bias = "base_model.model.layers.0.q.base_layer.bias"
    stack_of_biases = torch.randn(3, WIDTH, dtype=torch.float64)
    outputs = torch.func.vmap(lambda b: torch.func.functional_call(model, {bias: b}, (x,)))(stack_of_biases)
    alone = torch.func.functional_call(model, {bias: stack_of_biases[2]}, (x,))
    torch.testing.assert_close(outputs[2], alone, rtol=1e-12, atol=1e-14)
    _, tangent = torch.func.jvp(lambda t: call(stack[0] + t * stack[1]), (x.new_tensor(0.0),), (x.new_tensor(1.0),))
    step = 1e-6
    difference = (call(stack[0] + step * stack[1]) - call(stack[0] - step * stack[1])) / (2 * step)
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-8)


# ---------------------------------------------------------------------- nothing stale


def written_input(model, y):
    with torch.no_grad():
        y.mul_(2)
    return y


def written_a(model, y):
    with torch.no_grad():
        the_a(model).shared_A.mul_(2)
    return y


def replaced_a(model, y):
    A = the_a(model).shared_A.detach().clone().mul_(2)
    assert A._version == the_a(model).shared_A._version
    the_a(model).shared_A = nn.Parameter(A)
    return y


def another_scaling(model, y):
    block(model).k.scaling["default"] = 0.5
    return y


def moved_model(model, y):
    the_a(model).shared_A.data = the_a(model).shared_A.data * 2  # as an assignment of a new value
    the_a(model).to(torch.float64)
    return y


def optimizer_step(model, y):
    model(inputs()).sum().backward()
    the_a(model).shared_A.data.mul_(2)  # as FSDP2 writes, without a new version
    torch.optim.SGD([p for p in model.parameters() if p.grad is not None and p.ndim == 3], lr=0.0).step()
    return y


def another_tensor(model, y):
    return y * 2


def a_view(model, y):
    return y[:, 1:]


@pytest.mark.parametrize(
    "change",
    [written_input, written_a, replaced_a, another_scaling, moved_model, optimizer_step, another_tensor, a_view],
    ids=lambda change: change.__name__,
)
def test_a_product_is_not_read_after_a_change(change):
    model, x = adapted(), inputs()
    layers, y = block(model), inputs().tanh()
    kept = layers.q(y)
    assert products(model, lambda: layers.k(y)) == 0
    y = x.tanh()
    kept = layers.q(y)
    y = change(model, y)
    found = layers.k(y)
    with torch.no_grad():
        assert torch.equal(found, layers.k(y))
    assert kept.requires_grad


def test_an_a_that_is_trained_from_the_second_layer_on():
    model = adapted()
    layers, y, A = block(model), inputs().tanh(), the_a(model).shared_A
    A.requires_grad_(False)
    kept = layers.q(y)
    A.requires_grad_(True)
    layers.k(y).sum().backward()
    assert A.grad.abs().min() > 0
    assert kept.requires_grad


def test_autocast_between_two_layers():
    model = adapted(torch.float32)
    layers, y = block(model), inputs(torch.float32).tanh()
    with torch.autocast("cpu", torch.bfloat16):
        kept = layers.q(y)
    found = layers.k(y)
    with torch.no_grad():
        assert torch.equal(found, layers.k(y))
        with torch.autocast("cpu", torch.bfloat16):
            rounded = layers.k(y)
    assert not torch.equal(found, rounded.float())
    assert kept.requires_grad


def test_losses_that_are_differentiated_one_after_the_other():
    """As with LoRA: of two calls of one layer, and of layers that read an input without a graph of its own."""
    model, x = adapted(), inputs()
    layers = block(model)
    plain = x.detach()
    for losses in ([layers.q(plain).sum(), layers.k(plain).sum()], [layers.q(plain).sum(), layers.q(plain).sum()]):
        for loss in losses:
            loss.backward()
    y = x + 1  # whose graph keeps nothing and can be gone through again
    for loss in [layers.q(y).sum(), layers.q(y).sum()]:
        loss.backward()
    # Unlike with LoRA: layers that share the product have one graph.
    losses = [layers.q(y).sum(), layers.k(y).sum()]
    losses[0].backward(retain_graph=True)
    losses[1].backward()
    losses = [layers.q(y).sum(), layers.k(y).sum()]
    losses[0].backward()
    with pytest.raises(RuntimeError, match="a second time"):
        losses[1].backward()


def test_a_base_layer_s_output_is_not_written():
    model, x = adapted(), inputs()
    seen = []
    block(model).q.base_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    block(model).q(x)
    assert torch.equal(seen[0], nn.functional.linear(x, *block(model).q.base_layer.parameters()))


# ---------------------------------------------------------------------- how long


def test_nothing_outlives_its_graph():
    model = adapted()
    gc.disable()
    try:
        layers, y = block(model), inputs().tanh()
        layers.q(y)  # the output is dropped, and no other layer reads the product
        assert the_a(model).products._last.value() is None
        first = layers.q(y)
        assert the_a(model).products._last.value() is not None
        first.sum().backward()
        assert the_a(model).products._last.value() is None
        del first, y
        assert the_a(model).products._last.x() is None
        the_a(model).products.forget()
        with torch.no_grad():
            model(inputs())
        assert the_a(model).products._last is None
    finally:
        gc.enable()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_share_among_themselves(duplicate):
    model = adapted()
    model.get_base_model().run = type(model.get_base_model().layers[0]).__call__
    x = inputs()
    before = model(x)
    twin = duplicate(model)
    with torch.no_grad():
        the_a(model).shared_A.zero_()
    found = []
    assert products(twin, lambda: found.append(twin(x))) == LAYERS
    assert torch.equal(found[0], before)
