"""One adapted layer: values, gradients, copies, compilation, kinds of base layers and dtypes."""

import copy
import math
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from aslora import ASLoRAConfig


def q(model, layer=0):
    return model.get_base_model().layers[layer].q


def share(tiny, model, rows=(1, 1, 3, 3)):
    """Let the layers of a model share as in the map `rows`, at random values."""
    for B in tiny.groups(model).values():
        B.assign(torch.randn_like(B.stacked_B), list(rows))
    return model


def adapted_stack(bases, **fields):
    """Layers of one kind in a row, adapted."""

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleDict({"lin": base}) for base in bases)

        def forward(self, x):
            for layer in self.layers:
                x = layer["lin"](x)
            return x

    return get_peft_model(Stack(), ASLoRAConfig(target_modules=["lin"], init_weights=False, **({"r": 2} | fields)))


# ---------------------------------------------------------------------- values


def test_the_forward_is_equation_2(tiny):
    model = share(tiny, tiny.adapted())
    A = model.base_model.shared_a("default")["layers/*/q:8"].shared_A
    B = tiny.groups(model)["q"].stacked_B
    x = tiny.inputs(model)
    for layer, row in enumerate([1, 1, 3, 3]):
        base = q(model, layer).base_layer
        torch.testing.assert_close(q(model, layer)(x), base(x) + 3.0 * x @ A.T @ B[row].T, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("fields", "scaling"), [({}, 3.0), ({"use_rslora": True}, 6 / math.sqrt(2))], ids=str)
def test_scaling(tiny, fields, scaling):
    layer = q(tiny.adapted(**fields))
    A, B = layer.factors("default", torch.device("cpu"))
    torch.testing.assert_close(layer.get_delta_weight("default"), scaling * B @ A, rtol=1e-14, atol=0)


def test_conv1d_has_its_weight_transposed():
    torch.manual_seed(0)
    bases = [Conv1D(6, 4), Conv1D(4, 6)]
    with pytest.warns(UserWarning, match="Setting fan_in_fan_out to True"):
        model = adapted_stack([base.double() for base in bases])
    layer = model.base_model.model.layers[0]["lin"]
    A, B = layer.factors("default", torch.device("cpu"))
    assert (layer.in_features, layer.out_features) == (4, 6)
    assert layer.get_delta_weight("default").shape == bases[0].weight.shape == (4, 6)
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), bases[0](x) + layer.scaling["default"] * x @ A.T @ B.T)
    before = model(x)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged.layers[0]["lin"]) is Conv1D
    torch.testing.assert_close(merged(x), before, rtol=1e-12, atol=1e-12)


def test_dropout_acts_on_the_adapters_input_and_in_training_only(tiny):
    model = tiny.adapted(aslora_dropout=0.5)
    layer, x = q(model), tiny.inputs(model, rows=50)
    A, B = layer.factors("default", torch.device("cpu"))
    update = layer.eval()(x) - layer.base_layer(x)
    torch.testing.assert_close(update, 3.0 * x @ A.T @ B.T)
    torch.manual_seed(5)
    update = layer.train()(x) - layer.base_layer(x)
    torch.manual_seed(5)
    dropped = nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(update, 3.0 * dropped @ A.T @ B.T)


def test_a_bfloat16_base_gets_a_float32_adapter_unless_told_otherwise(tiny):
    for autocast, expected in ((True, torch.float32), (False, torch.bfloat16)):
        model = get_peft_model(tiny.net(dtype=torch.bfloat16), tiny.config(), autocast_adapter_dtype=autocast)
        tiny.train(model, 4)
        for B in tiny.groups(model).values():
            assert B.stacked_B.dtype == expected
            assert B.average.dtype == torch.float32
            assert B.merges_taken == 2
        assert {A.shared_A.dtype for A in model.base_model.shared_a("default").values()} == {expected}
        x = tiny.inputs(model)
        assert model(x).dtype == torch.bfloat16
        layer = q(model)
        expected_output = layer.base_layer(x).float() + x.float() @ layer.get_delta_weight("default").float().T
        torch.testing.assert_close(layer(x).float(), expected_output, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moving_a_model_to_half_precision_leaves_the_averages(tiny, dtype):
    model = tiny.adapted(dtype=torch.float32)
    tiny.train(model, 2)
    averages = {name: B.average.clone() for name, B in tiny.groups(model).items()}
    model.to(dtype)
    for name, B in tiny.groups(model).items():
        assert B.stacked_B.dtype == dtype
        assert torch.equal(B.average, averages[name])
    assert model(tiny.inputs(model)).dtype == dtype


def test_a_forward_after_a_change_of_dtype_reads_the_new_values(tiny):
    model = tiny.adapted(dtype=torch.float32)
    inner, x = model.get_base_model(), tiny.inputs(model)
    inner(x)  # around the tuner's forward, so that the rows it took are still kept
    before = inner(x)
    model.double()
    torch.testing.assert_close(inner(x.double()), before.double(), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------- gradients


def test_property_3_the_gradient_of_a_shared_b_is_the_sum_of_the_separate_ones(tiny):
    shared, apart = share(tiny, tiny.adapted()), tiny.adapted()
    for B in tiny.groups(apart).values():
        B.before_training_forward = None  # else rows with equal bits would share
    for name, B in tiny.groups(apart).items():
        with torch.no_grad():
            B.stacked_B.copy_(tiny.groups(shared)[name].stacked_B[[1, 1, 3, 3]])
    apart.base_model.aslora_A.load_state_dict(shared.base_model.aslora_A.state_dict())
    for model in (shared, apart):
        tiny.backward(model)
    for name, B in tiny.groups(shared).items():
        separate = tiny.groups(apart)[name].stacked_B.grad
        assert separate.abs().amax((1, 2)).min() > 1e-6
        for rows, row in (([0, 1], 1), ([2, 3], 3)):
            torch.testing.assert_close(B.stacked_B.grad[row], separate[rows].sum(0), rtol=1e-12, atol=1e-16)
        assert not B.stacked_B.grad[[0, 2]].any()
    gradients = [
        {name: A.shared_A.grad for name, A in model.base_model.shared_a("default").items()} for model in (shared, apart)
    ]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-12, atol=1e-16)


def test_property_3_gradcheck():
    """By finite differences of the values that are trained: each B of the groups once."""
    torch.manual_seed(0)
    model = adapted_stack([nn.Linear(3, 3).double() for _ in range(3)])
    (B,), (A,) = (getattr(model.base_model, f"shared_{x}")("default").values() for x in "ba")
    B.assign(torch.randn_like(B.stacked_B), [2, 1, 2])
    x = torch.randn(2, 3, dtype=torch.float64)
    weights = torch.randn(2, 3, dtype=torch.float64)

    def loss():
        return (model(x) * weights).sum()

    loss().backward()
    assert not B.stacked_B.grad[0].any()
    for layers in ([1], [0, 2]):
        for at in [(0, 0), (2, 1)]:
            ends = []
            for shift in (1e-6, -2e-6):
                with torch.no_grad():
                    B.stacked_B[(layers, *at)] += shift
                    ends.append(loss())
            with torch.no_grad():
                B.stacked_B[(layers, *at)] += 1e-6
            difference = (ends[0] - ends[1]) / 2e-6
            torch.testing.assert_close(B.stacked_B.grad[(layers[-1], *at)], difference, rtol=1e-7, atol=1e-9)
    inputs = [A.shared_A.detach().clone().requires_grad_(), x.clone().requires_grad_()]
    (name,) = (n for n, p in model.named_parameters() if p is A.shared_A)
    assert torch.autograd.gradcheck(lambda a, x: torch.func.functional_call(model, {name: a}, (x,)), inputs)


def by_indexing(monkeypatch, tiny, model):
    """Let the layers index the stack, as one would write it first."""
    for B in tiny.groups(model).values():
        monkeypatch.setattr(B, "forward", lambda position, B=B: B.stacked_B[B.sharing_map[position]])


def several_forwards(tiny, model):
    losses = [model(tiny.inputs(model, step)).square().mean() for step in range(3)]
    sum(losses).backward()


def accumulation(tiny, model):
    for step in range(3):
        tiny.backward(model, step)


def one_after_the_other(tiny, model):
    losses = [model(tiny.inputs(model, step)).square().mean() for step in range(3)]
    for loss in reversed(losses):
        loss.backward()


def twice_through_one_graph(tiny, model):
    loss = model(tiny.inputs(model)).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()


def with_evaluation_between(tiny, model):
    loss = model(tiny.inputs(model)).square().mean()
    with torch.no_grad():
        model(tiny.inputs(model, 1))
    with torch.inference_mode():
        model(tiny.inputs(model, 2))
    loss.backward()
    tiny.backward(model, 3)


def around_the_tuner(tiny, model):
    """A forward that does not pass by the tuner, which would take the rows anew."""
    for step in range(3):
        model.get_base_model()(tiny.inputs(model, step)).square().mean().backward()


def checkpointed(use_reentrant):
    def run(tiny, model):
        x = tiny.inputs(model).requires_grad_()
        for layer in model.get_base_model().layers:
            x = checkpoint(layer, x, use_reentrant=use_reentrant)
        x.square().mean().backward()

    run.__name__ = f"checkpointed_{'' if use_reentrant else 'non_'}reentrant"
    return run


@pytest.mark.parametrize(
    "way",
    [
        several_forwards,
        accumulation,
        one_after_the_other,
        twice_through_one_graph,
        with_evaluation_between,
        around_the_tuner,
        checkpointed(True),
        checkpointed(False),
    ],
    ids=lambda way: way.__name__,
)
def test_gradients_equal_those_of_indexing(tiny, monkeypatch, way):
    ours, indexed = tiny.adapted(), tiny.adapted()
    torch.manual_seed(1)
    share(tiny, ours)
    indexed.load_state_dict(ours.state_dict())
    by_indexing(monkeypatch, tiny, indexed)
    for model in (ours, indexed):
        way(tiny, model)
    for (name, a), b in zip(ours.named_parameters(), indexed.parameters(), strict=True):
        if a.requires_grad:
            assert a.grad.abs().max() > 1e-8, name
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-16, msg=name)


def test_nothing_is_kept_without_gradients(tiny):
    model = tiny.adapted()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not model(tiny.inputs(model)).requires_grad
    tiny.train(model, 2)
    assert tiny.taken(model) == {"q": 1, "v": 1}


def test_a_frozen_adapter_in_a_training_model(tiny):
    model = tiny.adapted()
    model.set_requires_grad("default", False)
    x = tiny.inputs(model).requires_grad_()
    model(x).sum().backward()
    assert x.grad.abs().min() > 0
    assert all(p.grad is None for p in model.parameters())


# ---------------------------------------------------------------------- copies and compilation


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_after_a_training_forward_stay_shared_among_themselves(tiny, duplicate):
    model = share(tiny, tiny.adapted())
    x = tiny.inputs(model)
    before = model(x)
    twin = duplicate(model)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        tiny.groups(twin)["q"].stacked_B.mul_(2)
    assert not torch.equal(twin(x), before)
    assert torch.equal(model(x), before)
    assert q(twin).aslora_B["default"] is q(twin, 3).aslora_B["default"] is tiny.groups(twin)["q"]


def test_layers_register_no_tensor_of_the_adapter(tiny):
    model = tiny.adapted()
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if "aslora_" in name]
    assert len(names) == 4
    assert all(name.startswith(("base_model.aslora_A.default.", "base_model.aslora_B.default.")) for name in names)


def test_compilation_without_graph_breaks(tiny):
    """Also after a merge, after which the layer reads another row, and without gradients."""
    model = tiny.adapted(dtype=torch.float32)
    layer, x = q(model, 2), tiny.inputs(model)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    try:
        for _ in range(3):
            torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=0)
            with torch.no_grad():
                torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=0)
            tiny.train(model, 2)
    finally:
        torch._dynamo.reset()
    assert tiny.taken(model)["q"] == 2


def test_gradients_of_a_compiled_layer(tiny):
    model = share(tiny, tiny.adapted())
    plain = copy.deepcopy(model)
    x = tiny.inputs(model)
    try:
        torch.compile(q(model), fullgraph=True, backend="eager")(x).square().sum().backward()
    finally:
        torch._dynamo.reset()
    q(plain)(x).square().sum().backward()
    torch.testing.assert_close(tiny.groups(model)["q"].stacked_B.grad, tiny.groups(plain)["q"].stacked_B.grad)


# ---------------------------------------------------------------------- merging into the base weight


def test_merging_and_unmerging(tiny):
    model = share(tiny, tiny.adapted())
    layer, x = q(model), tiny.inputs(model)
    weight, before = layer.base_layer.weight.detach().clone(), layer(x)
    layer.merge(safe_merge=True)
    torch.testing.assert_close(layer.base_layer.weight, weight + layer.get_delta_weight("default"), rtol=0, atol=1e-16)
    torch.testing.assert_close(layer(x), before, rtol=1e-13, atol=1e-14)
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.weight, weight, rtol=0, atol=1e-15)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_a_safe_merge_refuses_values_that_are_not_finite(tiny):
    model = tiny.adapted()
    with torch.no_grad():
        tiny.groups(model)["q"].stacked_B[0, 0, 0] = torch.nan
    weight = q(model).base_layer.weight.detach().clone()
    with pytest.raises(ValueError, match="NaNs detected"):
        q(model).merge(safe_merge=True)
    assert torch.equal(q(model).base_layer.weight, weight)


def test_a_layer_says_what_it_is(tiny):
    assert repr(q(tiny.adapted())).startswith("aslora.Linear(")
