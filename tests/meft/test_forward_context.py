"""Contexts of forward passes: when they begin and die, and which picks a recomputation gets."""

import gc
import threading
import weakref

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from meft import MEFTConfig
from meft.layer import MEFTLayer
from meft.retrieval import forward_context as context
from meft.retrieval.types import Selection
from tests.support.models import llama
from tests.support.training import trainable


@pytest.fixture(autouse=True)
def nothing_left_open():
    yield
    context.end(context.current())


def adapted(**fields):
    model = llama(dtype=torch.float64, num_key_value_heads=2)
    sizes = {"r": 16, "num_experts": 4, "experts_per_token": 2, "top_k": 3, "init_weights": False}
    config = MEFTConfig(**sizes | {"task_type": "CAUSAL_LM", "master_dtype": "float64"} | fields)
    return get_peft_model(model, config).train()


def ids(seed=0, rows=2):
    return torch.randint(0, 64, (rows, 7), generator=torch.Generator().manual_seed(seed))


def checkpointed(model, reentrant):
    model.enable_input_require_grads()
    model.config.use_cache = False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


def recorded(monkeypatch):
    """Weak references to all contexts that are opened from now on."""
    opened, begin = [], context.begin

    def watched(*args):
        made = begin(*args)
        if made is not None:
            opened.append(weakref.ref(made))
        return made

    monkeypatch.setattr(context, "begin", watched)
    return opened


def gradients(model):
    return [
        p.grad.to_dense() if "rows" in name else p.grad for name, p in model.named_parameters() if p.grad is not None
    ]


# ---------------------------------------------------------------------- life and death


@pytest.mark.parametrize("held", ["loss", "logits"])
def test_a_context_lives_as_long_as_the_graph(monkeypatch, held):
    model, opened = adapted(), recorded(monkeypatch)
    output = model(input_ids=ids(), labels=ids())
    assert len(opened) == 1
    kept = output[held]
    del output
    gc.collect()
    assert opened[0]() is not None
    kept.sum().backward()
    del kept
    gc.collect()
    assert opened[0]() is None


def test_a_context_of_an_abandoned_graph_dies_without_the_garbage_collector(monkeypatch):
    model, opened = adapted(), recorded(monkeypatch)
    output = model(input_ids=ids(), labels=ids())
    gc.collect()
    gc.disable()
    try:
        del output
        assert opened[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_recording_nothing_is_kept(monkeypatch, mode):
    model, opened = adapted(), recorded(monkeypatch)
    with mode():
        output = model(input_ids=ids(), labels=ids())
    assert output.loss is not None
    assert len(opened) == 1
    gc.collect()
    assert opened[0]() is None


def test_a_pass_is_one_context_from_whichever_end_it_is_called(monkeypatch):
    model, opened = adapted(), recorded(monkeypatch)
    for called in (model, model.base_model, model.base_model.model, model.get_base_model()):
        before = len(opened)
        called(input_ids=ids())
        assert len(opened) == before + 1
        assert context.current() is None
    model.generate(input_ids=ids(), max_new_tokens=3, do_sample=False)
    assert context.current() is None


def test_the_context_has_the_mask_and_the_number_of_layers(monkeypatch):
    model, seen = adapted(), []
    layer = next(m for m in model.modules() if isinstance(m, MEFTLayer))
    layer.register_forward_pre_hook(lambda module, args: seen.append(context.current()))
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    model(input_ids=ids(), attention_mask=mask)
    assert torch.equal(seen[0].mask, mask.bool())
    assert (seen[0].layers, seen[0].recorded) == (2, True)
    with torch.no_grad():
        model(input_ids=ids())
    assert (seen[1].mask, seen[1].recorded) == (None, False)
    checkpointed(model, False)
    model(input_ids=ids())
    with torch.no_grad():
        model(input_ids=ids())
    # Only what a recomputation will ask for is kept.
    assert [[len(s) for s in each.selections.values()] for each in seen] == [[], [], [1, 1], []]


def test_a_pass_inside_another_shares_its_context():
    outer = context.begin(None, 2)
    try:
        assert context.current() is outer
        inner = context.begin(torch.ones(1, 1, dtype=torch.bool), 5)
        assert inner is None
        context.end(inner)
        assert context.current() is outer
    finally:
        context.end(outer)
    assert context.current() is None


def test_a_model_inside_another_models_pass_leaves_the_outer_one_open():
    outer, inner, seen = adapted(), adapted(), []
    first, second = (m for m in outer.modules() if isinstance(m, MEFTLayer))
    first.register_forward_hook(lambda *_: inner(input_ids=ids(1)) and None)
    second.register_forward_pre_hook(lambda *_: seen.append(context.current()))
    outer(input_ids=ids())
    assert seen[0] is not None
    assert context.current() is None


@pytest.mark.parametrize(
    ("end", "interruption"),
    [
        ("tuner", RuntimeError),
        ("inner model", RuntimeError),
        ("tuner", KeyboardInterrupt),
        ("inner model", KeyboardInterrupt),
    ],
)
def test_an_exception_leaves_no_open_context(end, interruption):
    """An interrupted generate(), too: the next pass must not run with the old one's padding."""
    model, seen = adapted(), []
    called = model if end == "tuner" else model.get_base_model()
    layer = next(m for m in model.modules() if isinstance(m, MEFTLayer))

    def fail(*_):
        raise interruption("stop")

    padded = torch.ones(2, 7, dtype=torch.int64)
    padded[0, :3] = 0
    handle = layer.base_layer.register_forward_hook(fail)
    with pytest.raises(interruption):
        called(input_ids=ids(), attention_mask=padded)
    handle.remove()
    layer.register_forward_pre_hook(lambda *_: seen.append(context.current()))
    called(input_ids=ids())
    assert seen[0].mask is None
    assert context.current() is None


def test_threads_have_their_own_contexts():
    outer, seen = context.begin(None, 1), []

    def run():
        seen.append(context.current())
        own = context.begin(None, 3)
        seen.append(own)
        context.end(own)
        seen.append(context.current())

    try:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert seen[0] is seen[2] is None
        assert seen[1] is not None
        assert seen[1] is not outer
        assert context.current() is outer
    finally:
        context.end(outer)


# ---------------------------------------------------------------------- recomputation


@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpoint", "reentrant"])
def test_a_recomputation_makes_no_picks_of_its_own(monkeypatch, reentrant):
    import meft.routing.topk

    plain, model, calls = adapted(), checkpointed(adapted(), reentrant), []
    plain(input_ids=ids(), labels=ids()).loss.backward()
    select = meft.routing.topk.select_neurons
    monkeypatch.setattr(meft.routing.topk, "select_neurons", lambda *a: calls.append(1) or select(*a))
    loss = model(input_ids=ids(), labels=ids()).loss
    assert len(calls) == 2
    loss.backward()
    assert len(calls) == 2
    for a, b in zip(gradients(model), gradients(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpoint", "reentrant"])
def test_picks_are_let_go_when_the_layers_backward_pass_is_over(monkeypatch, reentrant, retain):
    model, opened, seen = checkpointed(adapted(), reentrant), recorded(monkeypatch), []

    def left():
        return [stash.selection is not None for stashes in opened[0]().selections.values() for stash in stashes]

    layers = [m for m in model.modules() if isinstance(m, MEFTLayer)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: seen.append(left()) if context.in_checkpoint_recompute() else None)
    loss = model(input_ids=ids(), labels=ids()).loss
    assert left() == [True, True]
    loss.backward(retain_graph=retain)
    assert seen == [[True, True], [True, retain]]
    assert left() == [retain, retain]
    gc.collect()
    assert (len([o for o in gc.get_objects() if type(o) is Selection]) > 0) == retain  # in the graph neither
    if retain:  # a second pass goes through the same picks, and leaves none
        first = [g.clone() for g in gradients(model)]
        model.zero_grad()
        loss.backward()
        assert left() == [False, False]
        for a, b in zip(gradients(model), first, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpoint", "reentrant"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_passes_that_are_alive_together_get_their_own_picks(order, reentrant):
    """Of equal shapes, padded in different ways: a wrong stash would give wrong gradients."""
    plain, model = adapted(), checkpointed(adapted(), reentrant)
    masks = [torch.ones(2, 7, dtype=torch.int64) for _ in range(3)]
    masks[1][0, :3], masks[2][1, :5] = 0, 0

    def losses(m):
        return [
            m(input_ids=ids(s), attention_mask=masks[s], labels=ids(s).masked_fill(masks[s] == 0, -100)).loss
            for s in range(3)
        ]

    for m in (plain, model):
        alive = losses(m)
        for i in order:
            (alive[i] * (i + 1)).backward()
    for a, b in zip(gradients(model), gradients(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


class FFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(16, 16, bias=False, dtype=torch.float64)

    def forward(self, x):
        return torch.tanh(self.up(x))


def test_a_layer_that_is_used_twice_in_a_pass_gets_the_picks_of_each_use():
    torch.manual_seed(0)
    layer = MEFTLayer(FFN(), 16)
    layer.update_layer(
        "default",
        MEFTConfig(r=16, num_experts=4, experts_per_token=2, top_k=3, init_weights=False, master_dtype="float64"),
    )
    inputs = [torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (0, 1)]
    found = []
    for recompute in (False, True):
        x, other = (t.clone().requires_grad_() for t in inputs)
        opened = context.begin(None, 1)
        call = (lambda t: checkpoint(layer, t, use_reentrant=False)) if recompute else layer
        y = call(call(x) + other)
        context.keep_with_graph(opened, y)
        context.end(opened)
        del opened
        keys = layer.meft_keys["default"].rows
        dx, dother, dkeys = torch.autograd.grad(y.square().sum(), [x, other, keys])
        found.append([dx, dother, dkeys.to_dense()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


def stash_of(x, neuron):
    one = torch.tensor([neuron])
    selection = Selection(one.int(), torch.zeros(1, 1, dtype=torch.int32), one)
    return context.SavedSelection(None, selection, None, context.input_fingerprint(x), (0, 0))


def test_the_stash_with_the_closest_input_is_found():
    key = (1, "default")
    inputs = [torch.full((4, 16), 1.0 + i) for i in range(3)]
    outputs, contexts = [], []
    for i, x in enumerate(inputs):
        opened = context.begin(None, 1)
        opened.selections[key] = [stash_of(x, i)]
        outputs.append(torch.ones((), requires_grad=True) * 2)
        context.keep_with_graph(opened, [{"out": (outputs[-1],)}])
        context.end(opened)
        contexts.append(opened)
    for i, x in enumerate(inputs):
        owner, stash = context.find_saved(key, x + 1e-6)
        assert owner is contexts[i]
        assert stash.selection.host_rows.item() == i
    assert context.find_saved((2, "default"), inputs[0]) is None
    assert context.find_saved(key, torch.ones(5, 16)) is None  # another number of tokens
    assert context.find_saved(key, inputs[0] + 0.4) is None  # nothing near
    del outputs[1], contexts[1], opened, owner, stash
    assert context.find_saved(key, inputs[1]) is None


def recorded_pass(key, x, neuron, then=lambda _: None):
    """A forward pass that has stashed a pick for x, and calls `then` in its backward pass."""
    opened = context.begin(None, 1)
    opened.selections[key] = [stash_of(x, neuron)]
    source = torch.ones((), requires_grad=True) * 3
    source.register_hook(then)
    output = source * 2
    context.keep_with_graph(opened, output)
    context.end(opened)
    return output


def test_which_of_several_passes_is_recomputed():
    """Dropout that a recomputation draws anew changes its input."""
    key, found = (1, "default"), []
    inputs = [torch.full((4, 16), float(i)) for i in (1, 2, 3)]

    def recompute(x):
        match = context.find_saved(key, x)
        found.append(match[1].selection.host_rows.item() if match is not None else None)

    recompute(inputs[0])
    assert found.pop() is None
    alone = recorded_pass(key, inputs[0], 0, lambda _: recompute(inputs[0] + 0.4))
    alone.backward()
    assert found.pop() == 0  # the only one, whatever the input
    recompute(inputs[0] + 0.4)
    assert found.pop() is None  # outside of its backward pass
    other = recorded_pass(key, inputs[1], 1)
    again = recorded_pass(key, inputs[0], 2, lambda _: list(map(recompute, inputs)) and None)
    again.backward()
    # Of equal ones that whose backward pass goes on; another one that is closer (its graph hangs on a hook's tensor);
    # of none that is close that whose backward pass goes on.
    assert found == [2, 1, 2]
    assert other.grad_fn is not None


def both_graphs(model):
    """A loss of one pass's output and of a tensor that a hook has kept from another one, padded in another way."""
    kept = []
    handle = model.get_base_model().model.norm.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    other = model(input_ids=ids(2), attention_mask=mask)
    handle.remove()
    loss = model(input_ids=ids(1), labels=ids(1)).loss + kept[0].square().mean()
    return loss, other


@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpoint", "reentrant"])
def test_a_backward_pass_through_an_output_and_a_hooks_tensor_of_another_pass(reentrant):
    plain, model = adapted(), checkpointed(adapted(), reentrant)
    for m in (plain, model):
        loss, _other = both_graphs(m)
        loss.backward()
    for a, b in zip(gradients(model), gradients(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpoint", "reentrant"])
def test_a_failed_backward_pass_that_somebody_holds_is_not_going_on(reentrant, same):
    plain, model = adapted(), checkpointed(adapted(), reentrant)
    failing = (model if same else checkpointed(adapted(), reentrant))(input_ids=ids(5))
    failing.logits.grad_fn.register_prehook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failing.logits.sum().backward()
    model.zero_grad()
    gc.collect()
    assert not any(each.in_backward for each in context._alive)
    for m in (plain, model):
        loss, _other = both_graphs(m)
        loss.backward()
    for a, b in zip(gradients(model), gradients(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_backward_pass_that_ends_in_an_error_spoils_no_other_one():
    plain, model = adapted(), checkpointed(adapted(), False)
    failing = model(input_ids=ids(1), labels=ids(1))
    handle = failing.logits.grad_fn.register_prehook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failing.loss.backward()
    handle.remove()
    for m in (plain, model):
        m(input_ids=ids(), labels=ids()).loss.backward()
    for a, b in zip(gradients(model), gradients(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpoint", "reentrant"])
def test_a_pass_over_the_same_batch_whose_graph_is_kept_is_not_mistaken_for_this_one(reentrant):
    """A list of losses keeps the graphs; the rows have changed since, and the first layer's input has not."""
    results = []
    for keep in (False, True):
        model, kept = checkpointed(adapted(), reentrant), []
        optimizer = torch.optim.AdamW(trainable(model), lr=0.5)
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(input_ids=ids(), labels=ids()).loss
            loss.backward()
            optimizer.step()
            kept.append(loss if keep else None)
        results.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_recomputation_after_the_rows_have_changed_is_an_error():
    """Not reentrant; a reentrant one first runs the layer when it recomputes, and has no older rows to compare with."""
    model = checkpointed(adapted(), False)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.1)
    stale = model(input_ids=ids(), labels=ids()).loss
    model(input_ids=ids(1), labels=ids(1)).loss.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="rows were updated between this forward pass and its backward pass"):
        stale.backward()


def test_recomputing_is_known_by_the_backward_pass():
    seen = []
    x = torch.ones((), requires_grad=True)
    y = x * 2
    y.register_hook(lambda g: seen.append(context.in_checkpoint_recompute()))
    assert not context.in_checkpoint_recompute()
    y.backward()
    assert seen == [True]
    assert not context.in_checkpoint_recompute()
