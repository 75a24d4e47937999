"""No two accesses of the engine to one memory are left to chance, and each hand-over is needed for that."""

import gc
import itertools
from contextlib import suppress

import pytest
import torch

import meft.tier.residency
from tests.support.happens_before import WatchedStreams, watched
from tests.support.tiny_meft import ROWS, STRATEGIES

# Hand-overs without which the order is the same, and why they are there.
NEEDLESS = {
    ("join", "Selection.wait_in"): "rows come behind their ids on the stream; it raises what went wrong with these",
    ("uses", "Host._sent 0"): "memory of the stream itself",
    ("uses", "sent 0"): "memory of the stream itself",
    ("uses", "DeviceCopy.prefetch 1"): "memory of the stream itself",
    ("uses", "KeyBuffers._queue 1"): "known until the keys are taken",
    **{("uses", f"LayerPlaces._change {i}"): "memory of the stream itself" for i in range(5)},
    ("join", "LayerPlaces.wait_for_writes"): "what the launching thread has written; another one may have",
    ("join", "LayerTier._step"): "as before: gradients that the launching thread has made",
    ("future", "_whole"): "the parts were drained by the same thread; it raises what went wrong with them",
    ("after", "_Buffer.__init__"): "gradients come from the computation, and later; one that is set by hand does not",
}


class LaterError(Exception):
    """What the base model raises."""


def fail(*args):
    raise LaterError


def fail_in_backward(module, args):
    if args[0].requires_grad:
        args[0].register_hook(fail)


def train(tiny, model, clip):
    """Two steps; more where rows get a place on the device, and others leave it."""
    optimizer = tiny.adamw(model)
    for step in range(5 if model.peft_config["default"].device_rows else 2):
        optimizer.zero_grad()
        for micro in range(2):
            (tiny.loss(model, 2 * step + micro) / 2).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(tiny.trainable(model), 0.5)
        if step:  # rows are read, and nothing that the host waits for comes after them
            tiny.loss(model).detach()
        optimizer.step()
    with torch.no_grad():
        tiny.loss(model)
    model.load_state_dict(tiny.state(model), strict=False)


def fail_at(tiny, model, watch, grad):
    hook = watch(fail)
    try:
        with torch.set_grad_enabled(grad):
            tiny.loss(model)
    except LaterError as error:
        error.__traceback__ = None
    hook.remove()
    gc.collect()


def abandon(tiny, model):
    """Passes that end in an error while rows are on their way, and an engine that is let go."""
    layer = tiny.layers(model)[1]
    # Its own rows are on their way when the base FFN begins, those of the layer above when its output is there.
    places = layer.base_layer.register_forward_pre_hook, layer.register_forward_hook
    for grad, watch in itertools.product((True, False), places):
        tiny.train(model, 1, optimizer=torch.optim.AdamW(tiny.trainable(model), lr=1e-3))
        fail_at(tiny, model, watch, grad)
        if not grad:
            for engine in model.base_model.engines.values():
                engine.use(engine.streams)
            fail_at(tiny, model, watch, grad)  # all rows are on their way, not those that have changed
            for engine in model.base_model.engines.values():
                engine.use(engine.streams)
    gc.collect()
    # In a backward pass, when the rows of the layer below are on their way; and when ids are.
    hook = tiny.layers(model)[2].register_forward_pre_hook(fail_in_backward)
    with suppress(LaterError):  # rows that stay on the device are not gathered
        tiny.loss(model).backward()
    hook.remove()
    gc.collect()
    with pytest.MonkeyPatch.context() as patch, suppress(LaterError):
        for name in ("host", "stream", "device_keys"):
            patch.setattr(f"meft.retrieval.strategies.{name}.gather", fail)
        tiny.loss(model)
    gc.collect()
    tiny.loss(model).detach()


def run(tiny, monkeypatch, checkpointing=None, clip=True, dtype=torch.bfloat16, **fields):
    """What happens in some steps with the compute copy in bfloat16, or with masters that are read themselves."""
    monkeypatch.setattr(meft.tier.residency, "EVERY", 1)
    gc.freeze()  # nor is what was imported since the tests were collected looked through each time
    model = tiny.adapted(layers=3, dtype=dtype, master_dtype="float32", **fields)
    if checkpointing is not None:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
        model.train()
    with watched(monkeypatch) as watch:
        for engine in model.base_model.engines.values():
            engine.use(WatchedStreams(watch))
        train(tiny, model, clip)
        abandon(tiny, model)
    return watch


def assert_no_race(watch, *of):
    assert not watch.races, "\n".join(map(str, [*of, *watch.races.values()]))


VARIANTS = {
    "reentrant": {"checkpointing": True},
    "non-reentrant, refetch": {"checkpointing": False, "backward_rows": "refetch"},
    "no clipping, masters are read": {"clip": False, "dtype": torch.float32, "backward_rows": "refetch"},
    "steps by the device": {"row_optimizer": {"zero_copy": True}},
    "rows on the device": {"device_rows": 0.3},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("strategy", ["stream", "device-rows"])
def test_there_is_no_race_in_a_variant(tiny, monkeypatch, strategy, variant):
    assert_no_race(run(tiny, monkeypatch, retrieval=strategy, **VARIANTS[variant]))


@pytest.mark.slow
def test_there_is_no_race_and_without_a_hand_over_there_is_one(tiny, monkeypatch):
    """In all the ways that rows take; without each of them, in one of the ways."""
    found, silent = set(), set()
    ways: list[dict] = [{"retrieval": s, "backward_rows": r} for s in STRATEGIES for r in reversed(ROWS)]
    ways += [ways[0] | VARIANTS["steps by the device"], *(way | VARIANTS["rows on the device"] for way in ways[::3])]
    for fields in ways:
        watch = run(tiny, monkeypatch, **fields)
        assert_no_race(watch, fields)
        for over in watch.seen - found - NEEDLESS.keys():
            (found if watch.races_without(over) else silent).add(over)
    assert silent <= found
    assert {kind for kind, _ in found} == {"after", "join", "wait", "future", "slot", "uses"}
    assert len(found) >= 19
