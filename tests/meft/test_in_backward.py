"""Rows that are updated within the backward pass, as their gradients land."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from meft import RowAdamW
from tests.support.thread_streams import on_streams
from tests.support.tiny_meft import STRATEGIES
from tests.support.training import trainable


def adapted(tiny, in_backward=True, strategy="stream", **fields):
    rule = {"in_backward": in_backward} | fields.pop("row_optimizer", {})
    model = tiny.adapted(layers=3, retrieval=strategy, row_optimizer=rule, **fields)
    return model, on_streams(model, longest=1e-3)


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
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_result_is_the_same_to_the_bit(tiny, strategy, checkpointing):
    states = []
    for in_backward in (False, True):
        model, _ = adapted(tiny, in_backward, strategy)
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
    assert set(tiny.most_touches(model)) == {4}


def test_accumulated_gradients_are_used_with_the_last_micro_batch(tiny):
    """To the bit as within the step, and not before the last backward pass."""
    states, moved = [], []
    for in_backward in (False, True):
        model, _ = adapted(tiny, in_backward)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
        optimizer = tiny.adamw(model, lr=2e-2)
        prepared = accelerator.prepare(optimizer)
        for micro in range(9):
            versions = [table.version for table in tiny.tables(model)]
            with accelerator.accumulate(model):
                accelerator.backward(tiny.loss(model, micro))
                now = [table.version for table in tiny.tables(model)]
                moved.append([a > b for a, b in zip(now, versions, strict=True)])
                prepared.step()
                prepared.zero_grad()
        states.append(tiny.whole_state(model))
    tiny.assert_equal(*states)
    tables = len(moved[0])
    # The first step shows by which rule.
    assert moved == [[False] * tables] * 14 + [[True] * tables, *[[False] * tables] * 2, [True] * tables]


def trainer(tiny, folder, model, **fields):
    data = [{"input_ids": row, "labels": row} for seed in range(7) for row in tiny.batch(2, 6, seed)]
    fields = {"max_grad_norm": 0.0, "gradient_accumulation_steps": 2, "num_train_epochs": 2} | fields
    return Trainer(
        model,
        TrainingArguments(str(folder), report_to=[], save_strategy="no", use_cpu=True, learning_rate=1e-2, **fields),
        train_dataset=data,
    )


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_trainer_trains_to_the_same_bits_and_logs_the_same_norms(tiny, tmp_path, accumulation):
    states, norms = [], []
    for in_backward in (False, True):
        model, _ = adapted(tiny, in_backward)
        run = trainer(
            tiny,
            tmp_path,
            model,
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=2,
            logging_steps=1,
        )
        run.train()
        states.append(tiny.whole_state(model))
        norms.append([float(log["grad_norm"]) for log in run.state.log_history if "grad_norm" in log])
    tiny.assert_equal(*states)
    assert norms[0] == norms[1]
    assert len(norms[0]) == 2 * (7 if accumulation == 1 else 4)


def test_a_trainer_that_would_clip_is_refused_before_it_begins(tiny, tmp_path):
    model, _ = adapted(tiny)
    before = tiny.whole_state(model)
    with pytest.raises(ValueError, match=r"max_grad_norm=1.0 would change gradients .* set max_grad_norm=0"):
        trainer(tiny, tmp_path, model, max_grad_norm=1.0).train()
    with pytest.raises(ValueError, match=r"fp16=True would change gradients .* bf16 in place of fp16"):
        model.base_model.check_run(SimpleNamespace(max_grad_norm=0, fp16=True))
    tiny.assert_equal(tiny.whole_state(model), before)


@pytest.mark.parametrize("why", ["rows in place", "RowAdamW", "ranks"])
def test_a_run_whose_rows_are_updated_within_the_step_may_clip(tiny, why):
    model, _ = adapted(tiny) if why != "rows in place" else (tiny.adapted(row_optimizer={"in_backward": True}), None)
    if why == "RowAdamW":
        held = RowAdamW(model.parameters())
        assert held is not None
    ranks = 2 if why == "ranks" else 1
    model.base_model.check_run(SimpleNamespace(max_grad_norm=1.0, fp16=False, world_size=ranks))


def test_a_trainer_goes_on_after_a_gradient_that_is_not_finite(tiny, tmp_path):
    """It asks for the norm, which is nan then, and multiplies by it."""
    model, _ = adapted(tiny)
    run = trainer(tiny, tmp_path, model, gradient_accumulation_steps=1, per_device_train_batch_size=2)
    compute, calls = run.compute_loss, []

    def once_infinite(*args, **kwargs):
        calls.append(1)
        return compute(*args, **kwargs) * (float("inf") if len(calls) == 3 else 1)

    run.compute_loss = once_infinite
    with pytest.warns(UserWarning, match="inf or nan"):
        run.train()
    assert all(bool(value.isfinite().all()) for value in tiny.whole_state(model).values())
    assert model.base_model.nonfinite_steps == 1
    assert len(calls) == 14


def test_a_consumed_gradient_is_not_changed_element_by_element(tiny):
    model, _ = adapted(tiny)
    optimizer = run(tiny, model, steps=1)
    tiny.loss(model).backward()
    gradient = tiny.tables(model)[0].rows.grad
    with pytest.raises(RuntimeError, match="in_backward=True"):
        gradient.mul_(torch.ones(gradient.shape))
    optimizer.zero_grad()


def test_an_accumulated_gradient_stays_where_adding_to_it_fails(tiny):
    model, _ = adapted(tiny)
    optimizer = run(tiny, model, steps=1)
    tiny.loss(model).backward()
    before = [table.rows.grad for table in tiny.tables(model)]
    with pytest.raises(RuntimeError, match="in_backward=True"):
        tiny.loss(model, 1).backward()
    assert all(a is table.rows.grad for a, table in zip(before, tiny.tables(model), strict=True))
    optimizer.zero_grad()


@pytest.mark.parametrize("how", ["norm", "value", "accumulation", "unscale"])
def test_what_would_change_a_gradient_afterwards_is_an_error(tiny, how):
    model, _ = adapted(tiny)
    optimizer = run(tiny, model, steps=1)
    tiny.loss(model).backward()
    before = tiny.whole_state(model)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    change = {
        "norm": lambda: torch.nn.utils.clip_grad_norm_(tiny.trainable(model), 1e-3),
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


@pytest.mark.parametrize("foreach", [True, False])
def test_the_norm_may_be_asked_for(tiny, foreach):
    """Clipping to a norm that is not reached changes nothing."""
    states, norms = [], []
    for in_backward in (False, True):
        model, _ = adapted(tiny, in_backward)

        def ask(model=model):
            parameters = trainable(model)
            norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, float("inf"), foreach=foreach)))

        run(tiny, model, steps=3, between=ask)
        states.append(tiny.whole_state(model))
    tiny.assert_equal(*states)
    assert norms[:3] == norms[3:]


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
    on_streams(twin)
    before = tiny.whole_state(model)
    run(tiny, twin, steps=2)
    tiny.assert_equal(tiny.whole_state(model), before)
    assert twin.base_model.steps is not model.base_model.steps


def test_another_value_is_refused(tiny):
    with pytest.raises(ValueError, match="in_backward='yes' must be True or False"):
        tiny.config(row_optimizer={"in_backward": "yes"})


@pytest.mark.parametrize("averages", [False, True])
def test_rows_wait_for_the_step_only_where_ranks_average(tiny, monkeypatch, averages):
    """A process group alone is no reason to wait: its ranks may train models of their own."""
    model, _ = adapted(tiny)
    optimizer = run(tiny, model, steps=1)
    ddp = SimpleNamespace(require_backward_grad_sync=False, process_group=None) if averages else None
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(DistributedDataParallel, "_get_active_ddp_module", lambda: ddp)
    monkeypatch.setattr(model.base_model.ranks, "_shared", lambda: ddp)  # it has broadcast its rows
    tiny.loss(model).backward()
    for table in tiny.tables(model):
        table.synchronize()
        assert bool(getattr(table.rows.grad, "consumed", False)) is not averages
    optimizer.zero_grad()
