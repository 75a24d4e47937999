"""Nor is what others do beside the engine left to chance: autograd, GradScaler, clipping, optimizers, averages."""

import time

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import meft.gradient.copies
import meft.gradient.scaling
from meft.gradient.host.accumulator import Pending, whole_of
from tests.support.happens_before import WatchedStreams, watched
from tests.support.tiny_meft import STRATEGIES


def train(tiny, model, fused, unscale, settles):
    """Steps of two micro-batches under a GradScaler, of which one overflows; rows are averaged."""
    optimizer = tiny.adamw(model, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for step in range(3):
        optimizer.zero_grad(set_to_none=bool(step))
        for micro in range(2):
            scaler.scale(tiny.loss(model, 2 * step + micro) / 2).backward()
        if step == 1:
            tiny.tables(model)[0].rows.grad.row_values[0, 0] = torch.inf
        if unscale:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(tiny.trainable(model), 0.5)
        scaler.step(optimizer)
        scaler.update()
        for table in tiny.tables(model) if settles else ():  # as README asks of whoever reads the parameters themselves
            table.synchronize()
        averaged.update_parameters(model)


def run(tiny, monkeypatch, plant=lambda patch: None, fused=False, unscale=True, settles=True, **fields):
    model = tiny.adapted(layers=2, dtype=torch.bfloat16, master_dtype="float32", **fields)
    with watched(monkeypatch) as watch, monkeypatch.context() as patch:
        plant(patch)
        for engine in model.base_model.engines.values():
            engine.use(WatchedStreams(watch))
        train(tiny, model, fused, unscale, settles)
    return watch


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True], ids=["in step", "unscaled first"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_there_is_no_race(tiny, monkeypatch, strategy, unscale, fused):
    watch = run(tiny, monkeypatch, unscale=unscale, fused=fused, retrieval=strategy)
    assert not watch.races, "\n".join(watch.races.values())
    assert ("synchronize", "wait_for_copies") in watch.seen


# -------------------------------------------------------------------------------------------- faults that are planted


def reading_at_once(patch):
    """The scale and the flag are read as soon as their copies are queued."""
    patch.setattr(meft.gradient.scaling, "wait_for_copies", lambda tensors: None)


def arrived(stored):
    """What a thread brings, without a wait for it, which happens to be through."""
    if not isinstance(stored, Pending):
        return stored
    while not stored.future.done():
        time.sleep(1e-4)
    return stored.future._result


def stepping_by_luck(patch):
    """A step does not wait for the drain."""
    patch.setattr(Pending, "landed", arrived)


def adding_by_luck(patch):
    """Nor does autograd, which adds the gradient of the second micro-batch."""
    merged = meft.gradient.copies.merged

    def at_once(a, b, most, *, in_place):
        return merged(whole_of(arrived(a)), whole_of(arrived(b)), most, in_place=in_place)

    patch.setattr(meft.gradient.copies, "merged", at_once)


def reported(watch, actor):
    """Races of the launching thread with an actor, whichever came first."""
    return [race for race in watch.races.values() if "(launching thread)" in race and f"({actor}" in race]


@pytest.mark.parametrize(
    ("plant", "actor"), [(reading_at_once, "computation"), (stepping_by_luck, "thread"), (adding_by_luck, "thread")]
)
def test_a_planted_fault_is_reported(tiny, monkeypatch, plant, actor):
    assert reported(run(tiny, monkeypatch, plant, retrieval="stream"), actor)


def test_who_reads_the_parameters_themselves_waits_for_their_update(tiny, monkeypatch):
    assert not reported(run(tiny, monkeypatch, settles=False, retrieval="stream"), "thread")
