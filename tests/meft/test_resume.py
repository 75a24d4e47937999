"""A Trainer's run that is resumed ends bit for bit where the uninterrupted run ends."""

import random
import shutil
import warnings

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from meft.table.moments import KEY

STEPS = 6
RESTART = "no moments of MEFT's rows: they restart"


def dataset(tiny):
    rows = tiny.batch(10, 8, seed=1)
    return [{"input_ids": row, "labels": row} for row in rows]


def adapted(tiny, adapter_name="default", **fields):
    """With dropout in the base model, so that the RNG matters."""
    base = tiny.base(dtype=torch.float32, attention_dropout=0.2, use_cache=False)
    return get_peft_model(base, tiny.config(init_weights=True, modules_to_save=["lm_head"], **fields), adapter_name)


class KeepRng(TrainerCallback):
    """The states of the random number generators after each step."""

    def __init__(self):
        self.seen = {}

    def on_step_end(self, args, state, control, **kwargs):
        self.seen[state.global_step] = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())


def make_trainer(tiny, model, folder, **fields):
    """Shuffled data, accumulation, clipping, a learning rate that changes, a checkpoint at every step."""
    fields = {"save_strategy": "steps", "save_steps": 1, "max_steps": STEPS} | fields
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        weight_decay=0.1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **fields,
    )
    more = {}
    if "eval_strategy" in fields:
        marks = iter([1, 2, 9, 4, 5, 6])  # the third step is said to be the best
        more = {"eval_dataset": dataset(tiny)[:2], "compute_metrics": lambda prediction: {"mark": next(marks)}}
    rng = KeepRng()
    trainer = Trainer(model, args, train_dataset=dataset(tiny), callbacks=[rng], **more)
    trainer.rng = rng
    return trainer


def final_state(tiny, trainer):
    """All that a run leaves: rows, moments, counts, router, head, optimizer and schedule, RNG."""
    model = trainer.model
    (adapter,) = model.peft_config
    state = tiny.whole_state(model, adapter)
    state["head"] = model.get_base_model().lm_head.modules_to_save[adapter].weight.detach().clone()
    for index, moments in enumerate(trainer.optimizer.state_dict()["state"].values()):
        tensors = {name: torch.as_tensor(value) for name, value in moments.items() if name != KEY}
        state |= {f"optimizer.{index}.{name}": value.clone() for name, value in tensors.items()}
    state["lr"] = torch.tensor(trainer.lr_scheduler.get_last_lr(), dtype=torch.float64)
    torch_rng, numpy_rng, python_rng = trainer.rng.seen[STEPS]
    state["rng.torch"] = torch_rng
    state["rng.numpy"] = torch.from_numpy(numpy_rng.astype(np.int64))
    state["rng.python"] = torch.tensor(python_rng[1])
    return state


def steps_of(tiny, trainer):
    """The number of steps of each table."""
    optimizer = trainer.optimizer
    return [int(optimizer.state[table.rows]["step"]) for table in tiny.tables(trainer.model)]


KINDS = {
    "float32": {},
    "bfloat16": {"master_dtype": "bfloat16"},
    "float8": {"master_dtype": "bfloat16", "row_optimizer": {"moments": "float8"}},
    "french": {"adapter_name": "french"},
}


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Kind -> end and folder of its uninterrupted run, made when it is asked for."""
    made = {}

    def run(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("whole")
            trainer = make_trainer(tiny, adapted(tiny, **KINDS[kind]), folder)
            trainer.train()
            made[kind] = final_state(tiny, trainer), folder
        return made[kind]

    return run


@pytest.mark.parametrize(
    ("kind", "step"),
    [("float32", 1), ("float32", 3), ("float32", 5), ("bfloat16", 3), ("float8", 3), ("french", 3)],
)
def test_a_resumed_run_equals_the_uninterrupted_one(tiny, runs, tmp_path, kind, step):
    expected, folder = runs(kind)
    trainer = make_trainer(tiny, adapted(tiny, **KINDS[kind]), tmp_path, save_strategy="no")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert not [w for w in caught if RESTART in str(w.message)]
    found = final_state(tiny, trainer)
    assert len(found) > 6 + 4 * 3
    tiny.assert_equal(found, expected)


def test_a_run_without_its_training_state_ends_elsewhere(tiny, runs, tmp_path):
    """So that the test above can fail; and there is exactly one warning."""
    expected, folder = runs("float32")
    checkpoint = shutil.copytree(folder / "checkpoint-3", tmp_path / "checkpoint-3")
    saved = torch.load(checkpoint / "optimizer.pt")
    saved["state"] = {i: state for i, state in saved["state"].items() if KEY not in state}
    torch.save(saved, checkpoint / "optimizer.pt")
    trainer = make_trainer(tiny, adapted(tiny), tmp_path / "out", save_strategy="no")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert len([w for w in caught if RESTART in str(w.message)]) == 1
    found = final_state(tiny, trainer)
    assert steps_of(tiny, trainer) == [STEPS - 3] * 4
    assert not any(
        torch.equal(found[name], expected[name]) for name in expected if name.endswith("values.default.rows")
    )


def test_an_earlier_checkpoint_over_a_later_state(tiny, runs, tmp_path):
    expected, folder = runs("float32")
    model = adapted(tiny)
    make_trainer(tiny, model, tmp_path, save_strategy="no").train()
    trainer = make_trainer(tiny, model, tmp_path, save_strategy="no")
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    tiny.assert_equal(final_state(tiny, trainer), expected)


def test_a_second_run_begins_with_fresh_moments(tiny, tmp_path):
    model = adapted(tiny)
    trainer = make_trainer(tiny, model, tmp_path, save_strategy="no", max_steps=3)
    trainer.train()
    assert steps_of(tiny, trainer) == [3] * 4
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(tiny, model, tmp_path, save_strategy="no", max_steps=2)
        trainer.train()
    assert steps_of(tiny, trainer) == [2] * 4
    assert not [w for w in caught if RESTART in str(w.message)]


def test_load_best_model_at_end(tiny, tmp_path):
    trainer = make_trainer(
        tiny,
        adapted(tiny),
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="mark",
        greater_is_better=True,
    )
    after_each = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            after_each[state.global_step] = tiny.state(model)

    trainer.add_callback(Keep())
    trainer.train()
    assert trainer.state.best_global_step == 3
    tiny.assert_equal(tiny.state(trainer.model), after_each[3])
    trainer.model.save_pretrained(tmp_path / "best")
    fresh = adapted(tiny)
    fresh.load_adapter(tmp_path / "best", "default")
    tiny.assert_equal(tiny.state(fresh), after_each[3])


def test_resume_by_hand_in_a_plain_loop(tiny, tmp_path):
    def start():
        model = tiny.adapted(dtype=torch.float32)
        return model, tiny.adamw(model)

    whole, optimizer = start()
    tiny.train(whole, 5, optimizer)

    model, optimizer = start()
    tiny.train(model, 2, optimizer)
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")

    resumed, optimizer = start()
    resumed.load_adapter(tmp_path, "default", is_trainable=True)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    tiny.train(resumed, 3, optimizer, first=2)
    tiny.assert_equal(tiny.whole_state(resumed), tiny.whole_state(whole))
