"""A run that is resumed ends bit for bit where the uninterrupted run ends, whatever the phase of the sharing."""

import random
import shutil
import warnings

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from aslora import ASLoRAConfig
from tests.support.models import llama
from tests.support.training import trainable

STEPS = 8
FIRST, LAST = 3, 5  # the steps of the two merges


def dataset():
    rows = torch.randint(64, (6, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in rows]


def adapted(**fields):
    """With dropout, so that the RNG matters."""
    fields = {
        "r": 4,
        "aslora_dropout": 0.2,
        "target_modules": ["q_proj", "v_proj"],
        "merge_start": 1,
        "merge_interval": 2,
        "num_merges": 2,
        "modules_to_save": ["lm_head"],
    } | fields
    return get_peft_model(llama(4, use_cache=False), ASLoRAConfig(**fields))


class KeepRng(TrainerCallback):
    """The states of the random number generators after each step."""

    def __init__(self):
        self.seen = {}

    def on_step_end(self, args, state, control, **kwargs):
        self.seen[state.global_step] = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())


def make_trainer(model, folder, **fields):
    """Shuffled data, a learning rate that changes, a checkpoint at every step."""
    fields = {"save_strategy": "steps", "save_steps": 1} | fields
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        weight_decay=0.1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **fields,
    )
    rng = KeepRng()
    trainer = Trainer(model, args, train_dataset=dataset(), callbacks=[rng], **evaluation(fields))
    trainer.rng = rng
    return trainer


def evaluation(fields):
    if "eval_strategy" not in fields:
        return {}
    # The fourth step is said to be the best: after the first merge and before the last.
    marks = iter([1, 2, 3, 9, 4, 5, 6, 7])
    return {"eval_dataset": dataset()[:2], "compute_metrics": lambda prediction: {"mark": next(marks)}}


def model_state(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "base_layer" not in name}


def final_state(trainer):
    """All that a run leaves: weights, maps, averages, counts, optimizer and schedule, RNG."""
    state = model_state(trainer.model)
    for index, moments in enumerate(trainer.optimizer.state_dict()["state"].values()):
        state |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    state["lr"] = torch.tensor(trainer.lr_scheduler.get_last_lr(), dtype=torch.float64)
    torch_rng, numpy_rng, python_rng = trainer.rng.seen[STEPS]
    state["rng.torch"] = torch_rng
    state["rng.numpy"] = torch.from_numpy(numpy_rng.astype(np.int64))
    state["rng.python"] = torch.tensor(python_rng[1])
    return state


def assert_equal(state, expected):
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


def group(model, projection="q_proj"):
    return next(B for name, B in model.base_model.aslora_B["default"].items() if projection in name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run: its end, its model after every step, and the folder of its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = make_trainer(adapted(), folder)
    steps = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            steps[state.global_step] = model_state(model)

    trainer.add_callback(Keep())
    trainer.train()
    assert [m["step"] for m in trainer.model.base_model.sharing_report().merges] == [FIRST, FIRST, LAST, LAST]
    return final_state(trainer), steps, folder


# Before the first merge, right before it, on it, between the two, on the last, after it.
@pytest.mark.parametrize("step", [1, FIRST - 1, FIRST, FIRST + 1, LAST, LAST + 1])
def test_resume_in_a_new_process_state(whole, tmp_path, step):
    expected, _, folder = whole
    trainer = make_trainer(adapted(), tmp_path, save_strategy="no")
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert_equal(final_state(trainer), expected)


@pytest.mark.parametrize("step", [1, FIRST, LAST])
def test_an_earlier_checkpoint_over_a_later_state(whole, step):
    """The same model and Trainer go on from the past: later merges, averages and moments must not shine through."""
    expected, _, folder = whole
    trainer = make_trainer(adapted(), folder, save_strategy="no")
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{LAST + 1}"))
    assert group(trainer.model).finished
    set_seed(trainer.args.seed)  # as a new Trainer does: the order of the data hangs on it
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert_equal(final_state(trainer), expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"merge_value": "mean"},
        {"merge_scope": "joint", "share_a": "joint", "similarity": "product"},
        {"merge_candidates": "adjacent", "use_rslora": True},
    ],
    ids=["mean", "joint-product", "adjacent"],
)
def test_resume_between_two_merges_with_every_other_choice(tmp_path, fields):
    trainer = make_trainer(adapted(**fields), tmp_path)
    trainer.train()
    expected = final_state(trainer)
    again = make_trainer(adapted(**fields), tmp_path, save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{FIRST + 1}"))
    assert_equal(final_state(again), expected)


@pytest.mark.parametrize("step", [1, FIRST, LAST])
def test_a_checkpoint_holds_the_model_of_its_step(whole, step):
    _, steps, folder = whole
    model = adapted()
    model.load_adapter(folder / f"checkpoint-{step}", "default")
    assert_equal(model_state(model), steps[step])


def test_load_best_model_at_end(tmp_path):
    """The best model is of a step between the merges: its map, averages and counts come back with its weights."""
    trainer = make_trainer(
        adapted(),
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
            after_each[state.global_step] = model_state(model)

    trainer.add_callback(Keep())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert trainer.state.best_global_step == FIRST + 1
    assert_equal(model_state(trainer.model), after_each[FIRST + 1])
    B = group(trainer.model)
    assert B.merges_taken == 1
    assert B.step == FIRST + 1
    # All merges of the run were done: that the best model lacks one is no fault of the schedule.
    assert not [w for w in caught if "not done" in str(w.message)]


def test_resume_by_hand_in_a_plain_loop(tmp_path):
    """save_pretrained, the optimizer's state_dict and nothing else; SGD with momentum."""

    def run(model, optimizer, steps):
        model.train()
        for step in steps:
            batch = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(step))
            torch.manual_seed(step)
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def start():
        model = adapted(total_steps=STEPS)
        return model, torch.optim.SGD(trainable(model), lr=0.1, momentum=0.9)

    whole_model, whole_optimizer = start()
    run(whole_model, whole_optimizer, range(STEPS))

    model, optimizer = start()
    run(model, optimizer, range(FIRST))
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")

    resumed, optimizer = start()
    resumed.load_adapter(tmp_path, "default", is_trainable=True)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    run(resumed, optimizer, range(FIRST, STEPS))
    assert_equal(model_state(resumed), model_state(whole_model))
    ours, theirs = optimizer.state_dict()["state"], whole_optimizer.state_dict()["state"]
    assert all(torch.equal(ours[i]["momentum_buffer"], theirs[i]["momentum_buffer"]) for i in theirs)


def test_resume_from_a_damaged_checkpoint_is_an_error(whole, tmp_path):
    """Not a run that goes on from somewhere else."""
    _, _, folder = whole
    damaged = shutil.copytree(folder / f"checkpoint-{FIRST}", tmp_path / f"checkpoint-{FIRST}")
    weights = damaged / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + 100] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match="restore"):
        make_trainer(adapted(), tmp_path, save_strategy="no").train(resume_from_checkpoint=str(damaged))
