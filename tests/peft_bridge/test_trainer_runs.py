"""What a Trainer tells the tuner, without a call from the user."""

import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers
import transformers.trainer
from peft import get_peft_model
from torch import nn

from aslora import ASLoRAConfig
from peft_bridge import RunListener, watch_runs
from peft_bridge.training.trainer_runs import RunEvents


class Recorder(nn.Module, RunListener):
    def __init__(self):
        super().__init__()
        self.events = []
        self.lin = nn.Linear(2, 2)

    def on_run_begin(self, total_steps, done_steps, steps_seen):
        self.events.append(("begin", total_steps))

    def on_run_end(self):
        self.events.append(("end",))

    def update_and_allocate(self, global_step):
        self.events.append(("step", global_step))


class Forwarding(nn.Module):
    """Passes unknown attributes on, as PEFT's and accelerate's wrappers do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def run(model, optimizer=None, max_steps=7):
    events, state = RunEvents(), SimpleNamespace(max_steps=max_steps, global_step=3)
    events.on_train_begin(None, state, None, model=model)
    events.on_step_end(None, state, None, model=model, optimizer=optimizer)
    events.on_train_end(None, state, None, model=model)


def test_the_callback_is_one_of_transformers_defaults_once():
    for _ in range(3):
        watch_runs()
    assert transformers.trainer.DEFAULT_CALLBACKS.count(RunEvents) == 1


def test_beginning_and_end_are_told_once_through_any_wrapper():
    listener = Recorder()
    assert Forwarding(listener).on_run_begin  # so that duck typing would find it twice
    for model in (listener, Forwarding(Forwarding(listener)), nn.Sequential(listener, listener)):
        listener.events.clear()
        run(model)
        assert listener.events == [("begin", 7), ("end",)]


def test_every_listener_in_a_model_is_told():
    listeners = [Recorder(), Recorder()]
    run(nn.Sequential(*listeners))
    assert [listener.events for listener in listeners] == [[("begin", 7), ("end",)]] * 2


def test_no_model_and_a_model_without_listeners():
    run(None)
    run(nn.Linear(2, 2))


def test_only_optimizers_that_the_hooks_cannot_see_need_to_be_told_of_steps():
    listener = Recorder()
    deepspeed = type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})()
    wrapped = type("DeepSpeedOptimizerWrapper", (), {"__module__": "accelerate.utils.deepspeed"})()
    for optimizer in (deepspeed, wrapped):
        listener.events.clear()
        run(listener, optimizer)
        assert listener.events == [("begin", 7), ("step", 3), ("end",)]
    listener.events.clear()
    run(listener, torch.optim.SGD(listener.parameters(), lr=0.1))
    assert listener.events == [("begin", 7), ("end",)]


def adapted(**fields):
    blocks = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(4))
    return get_peft_model(nn.ModuleDict({"layers": blocks}), ASLoRAConfig(r=2, target_modules=["q"], **fields))


def test_data_parallel_is_refused_where_the_model_is_adapted():
    state = SimpleNamespace(max_steps=3, global_step=0)
    with pytest.raises(ValueError, match=r"sees 2 GPUs.*torchrun --nproc_per_node=2, or set CUDA_VISIBLE_DEVICES=0"):
        RunEvents().on_train_begin(SimpleNamespace(n_gpu=2), state, None, model=adapted())
    RunEvents().on_train_begin(SimpleNamespace(n_gpu=2), state, None, model=nn.Linear(2, 2))
    RunEvents().on_train_begin(SimpleNamespace(n_gpu=0), state, None, model=adapted())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_trainer_takes_no_data_parallel_of_a_quantised_model(bits):
    """As transformers marks it, on the base model."""
    state = SimpleNamespace(max_steps=3, global_step=0)
    model = adapted()
    setattr(model.get_base_model(), f"is_loaded_in_{bits}bit", True)
    trainer = object.__new__(transformers.Trainer)
    trainer.args = SimpleNamespace(n_gpu=2)
    trainer.accelerator = SimpleNamespace(unwrap_model=lambda model, **_: model)
    assert trainer._wrap_model(model, training=False) is model
    RunEvents().on_train_begin(SimpleNamespace(n_gpu=2), state, None, model=model)


def test_the_length_of_the_run_reaches_the_tuner_unless_the_config_says_otherwise():
    model = adapted()
    model.add_adapter("fixed", ASLoRAConfig(r=2, target_modules=["q"], total_steps=50))
    state = SimpleNamespace(max_steps=200, global_step=0)
    RunEvents().on_train_begin(None, state, None, model=Forwarding(model))
    assert model.base_model.run.total_steps == {"default": 200, "fixed": 50}
    assert model.base_model.run.units["default"][0].plan(200) == [35, 60]
    RunEvents().on_train_begin(None, SimpleNamespace(max_steps=100, global_step=0), None, model=model)  # a second run
    assert model.base_model.run.total_steps == {"default": 100, "fixed": 50}


def test_an_end_before_the_last_merge_is_worth_one_warning():
    model = adapted()
    RunEvents().on_train_begin(None, SimpleNamespace(max_steps=200, global_step=0), None, model=model)
    with pytest.warns(UserWarning, match=r"2 merges of adapter 'default' not done.*step 60"):
        RunEvents().on_train_end(None, None, None, model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RunEvents().on_train_end(None, None, None, model=model)


def test_deepspeeds_steps_take_the_merges():
    model = adapted(merge_start=0, merge_interval=2, init_weights=False)
    optimizer = type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime"})()
    for step in range(1, 5):
        RunEvents().on_step_end(None, SimpleNamespace(global_step=step), None, model=model, optimizer=optimizer)
    (B,) = model.base_model.shared_b("default").values()
    assert [merge[0] for merge in B.merges()] == [2, 4]


# ---------------------------------------------------------------------- what a run tells


class Careful(Recorder):
    """Writes down all that it is told."""

    def on_run_begin(self, total_steps, done_steps, steps_seen):
        self.events.append(("begin", total_steps, done_steps, steps_seen))


def test_a_resumed_run_tells_the_steps_that_were_done():
    listener = Careful()
    for done in (0, 4):
        listener.events.clear()
        state = SimpleNamespace(max_steps=7, global_step=done)
        RunEvents().on_train_begin(None, state, None, model=listener)
        assert listener.events == [("begin", 7, done, True)]


def test_a_run_is_checked_before_anybody_hears_of_its_begin():
    class Strict(Careful):
        def check_run(self, arguments):
            if arguments.max_grad_norm:
                raise ValueError("no")

    model = nn.Sequential(Careful(), Strict())
    state = SimpleNamespace(max_steps=7, global_step=0)
    with pytest.raises(ValueError, match="no"):
        RunEvents().on_train_begin(SimpleNamespace(max_grad_norm=1.0), state, None, model=model)
    assert [each.events for each in model] == [[], []]
    RunEvents().on_train_begin(SimpleNamespace(max_grad_norm=0.0), state, None, model=model)
    assert [each.events for each in model] == [[("begin", 7, 0, True)]] * 2


def test_whether_the_optimizer_hooks_see_the_steps():
    listener = Careful()
    deepspeed = type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})()
    wrapped = type("DeepSpeedOptimizerWrapper", (), {"__module__": "accelerate.utils.deepspeed"})()
    seen = torch.optim.SGD(listener.parameters(), lr=0.1)
    state = SimpleNamespace(max_steps=7, global_step=0)
    for optimizer in (deepspeed, wrapped, seen, None):
        RunEvents().on_train_begin(None, state, None, model=listener, optimizer=optimizer)
    assert [event[3] for event in listener.events] == [False, False, True, True]


def test_a_trainer_tells_of_its_run_in_order(tmp_path):
    """Begin and end; and the same for a run that is resumed."""
    told = []

    class Model(nn.Module, RunListener):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(2, 1)

        def forward(self, x, labels=None):
            return {"loss": self.lin(x).square().mean()}

        def on_run_begin(self, total_steps, done_steps, steps_seen):
            told.append(("begin", total_steps, done_steps, steps_seen))

        def on_run_end(self):
            told.append("end")

    def trainer():
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=1,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        return transformers.Trainer(Model(), args, train_dataset=[{"x": torch.ones(2)}] * 4)

    trainer().train()
    assert told == [("begin", 4, 0, True), "end"]
    told.clear()
    trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert told == [("begin", 4, 2, True), "end"]
