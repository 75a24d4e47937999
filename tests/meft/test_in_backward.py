"""Rows that are updated within the backward pass, as their gradients land."""

import copy

import pytest
import torch
from test_engine import STRATEGIES, on_lanes

from meft import RowAdamW


def adapted(tiny, in_backward=True, strategy="stream", **fields):
    rule = {"in_backward": in_backward} | fields.pop("row_optimizer", {})
    model = tiny.adapted(layers=3, retrieval=strategy, row_optimizer=rule, **fields)
    return model, on_lanes(model, longest=1e-3)


def run(tiny, model, steps=4, schedule=True, between=lambda: None):
    optimizer = tiny.adamw(model, lr=2e-2)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.25, total_iters=4)
    for step in range(steps):
        tiny.loss(model, step).backward()
        between()
        optimizer.step()
        if schedule:
            rate.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", ["lazy", "dense"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_result_is_the_same_to_the_bit(tiny, strategy, mode, checkpointing):
    states = []
    for in_backward in (False, True):
        model, _ = adapted(tiny, in_backward, strategy, row_optimizer={"mode": mode})
        if checkpointing:
            model.enable_input_require_grads()
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        run(tiny, model)
        states.append(tiny.whole_state(model))
    tiny.assert_equal(*states)


@pytest.mark.parametrize("alone", [False, True])
def test_a_row_adamw_updates_by_itself(tiny, alone):
    states = []
    for in_backward in (False, True):
        model, _ = adapted(tiny, in_backward)
        tables = [table.rows for table in tiny.tables(model)]
        optimizers = [RowAdamW(tables, lr=2e-2)]
        if not alone:
            others = {id(rows) for rows in tables}
            optimizers.append(torch.optim.AdamW([p for p in tiny.trainable(model) if id(p) not in others]))
        for step in range(3):
            tiny.loss(model, step).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        states.append(tiny.whole_state(model))
    tiny.assert_equal(*states)


def test_rows_have_moved_before_the_step(tiny):
    model, _ = adapted(tiny)
    versions = []
    run(tiny, model, between=lambda: versions.append([table.version for table in tiny.tables(model)]))
    assert all(now > before for now, before in zip(versions[2], versions[1], strict=True))
    # The first step shows by which rule rows are updated; the second is the first within a backward pass.
    moments = [table.moments.step for table in tiny.tables(model)]
    assert moments == [4] * len(moments)


@pytest.mark.parametrize("how", ["norm", "value", "accumulation", "unscale"])
def test_what_would_change_a_gradient_afterwards_is_an_error(tiny, how):
    model, _ = adapted(tiny)
    optimizer = run(tiny, model, steps=1)
    tiny.loss(model).backward()
    before = tiny.whole_state(model)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    change = {
        "norm": lambda: torch.nn.utils.clip_grad_norm_(tiny.trainable(model), 1.0),
        "value": lambda: torch.nn.utils.clip_grad_value_(tiny.trainable(model), 1.0),
        "accumulation": lambda: tiny.loss(model).backward(),
        "unscale": lambda: scaler.unscale_(optimizer),
    }[how]
    with pytest.raises(RuntimeError, match=r"in_backward=True.*max_grad_norm=0"):
        change()
    tiny.assert_equal(tiny.whole_state(model), before)
    optimizer.zero_grad()
    tiny.loss(model).backward()
    optimizer.step()


def test_gradients_that_are_zeroed_in_place_do_not_count_as_accumulation(tiny):
    states = []
    for set_to_none in (True, False):
        model, _ = adapted(tiny)
        optimizer = tiny.adamw(model)
        for step in range(3):
            optimizer.zero_grad(set_to_none=set_to_none)
            tiny.loss(model, step).backward()
            optimizer.step()
        states.append(tiny.whole_state(model))
    tiny.assert_equal(*states)


def test_a_gradient_that_is_not_finite_leaves_its_rows(tiny):
    model, _ = adapted(tiny)
    optimizer = run(tiny, model, steps=1)
    before = tiny.whole_state(model)
    (tiny.loss(model) * float("nan")).backward()
    with pytest.warns(UserWarning, match="inf or nan"):
        optimizer.step()
    tiny.assert_equal(tiny.whole_state(model), before)
    assert model.base_model.nonfinite_steps == 1


def test_a_copy_of_the_model_updates_its_own_rows(tiny):
    model, _ = adapted(tiny)
    run(tiny, model, steps=1)
    twin = copy.deepcopy(model)
    on_lanes(twin)
    before = tiny.whole_state(model)
    run(tiny, twin, steps=2)
    tiny.assert_equal(tiny.whole_state(model), before)
    assert twin.base_model.steps is not model.base_model.steps


def test_another_value_is_refused(tiny):
    with pytest.raises(ValueError, match="in_backward='yes' must be True or False"):
        tiny.config(row_optimizer={"in_backward": "yes"})


def test_of_several_ranks_rows_move_within_the_step(tiny, monkeypatch):
    model, _ = adapted(tiny)
    run(tiny, model, steps=1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(model.base_model.ranks, "note_forward", lambda: None)
    before = [table.version for table in tiny.tables(model)]
    tiny.loss(model).backward()
    assert [table.version for table in tiny.tables(model)] == before
    assert not any(table.rows.grad.spent for table in tiny.tables(model))
