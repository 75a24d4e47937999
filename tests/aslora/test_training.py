"""The sharing runs by itself in every usual way of training: what counts as a step, when merges come, the gradients."""

import copy
import warnings

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from aslora import ASLoRAConfig
from tests.support.models import llama
from tests.support.training import trainable

LAYERS, STEPS = 5, 20
# Default schedule for T = 20 and 5 layers: 3 merges from floor(0.05 T) = 1 to floor(0.30 T) = 6, evenly.
DEFAULT_STEPS = [3, 5, 6]


def tokens(n, length=8):
    return torch.randint(64, (n, length), generator=torch.Generator().manual_seed(1))


def dataset(n):
    return [{"input_ids": row, "labels": row} for row in tokens(n)]


def adapted(dtype=torch.float32, layers=LAYERS, **fields):
    """A random Llama with ASLoRA on q and v."""
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | fields
    return get_peft_model(llama(layers, dtype, use_cache=False), ASLoRAConfig(**fields))


def groups(model):
    """Projection -> its B-group, of the only adapter."""
    return {name.split("/")[-1].split(":")[0]: B for name, B in model.base_model.shared_b("default").items()}


def merge_steps(model):
    """Projection -> the steps of its merges."""
    steps = {"q_proj": [], "v_proj": []}
    for merge in model.base_model.sharing_report().merges:
        steps[merge["projection"].split(".")[-1]].append(merge["step"])
    return steps


class MeanOfB:
    """The oracle of the running averages: keeps each B that a real optimizer step leaves, and averages them all."""

    def __init__(self, model):
        self.model, self.seen = model, {name: [] for name in groups(model)}

    def note(self):
        for name, B in groups(self.model).items():
            self.seen[name].append(B.stacked_B.detach().double().clone())

    def check(self, steps):
        for name, B in groups(self.model).items():
            assert len(self.seen[name]) == B.step == steps
            assert self.seen[name][0].abs().max() > 0
            torch.testing.assert_close(
                B.average.double(), torch.stack(self.seen[name]).mean(0), rtol=1e-5, atol=1e-8, msg=name
            )


def arguments(tmp_path, **fields):
    fields = {"max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-2} | fields
    return TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, **fields
    )


def plain_loop(model, steps, also_explicit=False):
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    for step in range(1, steps + 1):
        batch = tokens(2 * steps)[2 * step - 2 : 2 * step]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if also_explicit:
            model.base_model.update_and_allocate(step)
    return optimizer


# ---------------------------------------------------------------------- plain loop


def test_plain_loop_merges_at_the_planned_steps_and_learns():
    model = adapted(total_steps=STEPS)
    batch = tokens(2)
    before = model(input_ids=batch, labels=batch).loss.item()
    plain_loop(model, STEPS)
    assert merge_steps(model) == {"q_proj": DEFAULT_STEPS, "v_proj": DEFAULT_STEPS}
    assert all(len(B.live_rows) == 2 and B.finished for B in groups(model).values())
    assert model(input_ids=batch, labels=batch).loss.item() < before


def test_calling_update_and_allocate_as_well_changes_nothing():
    implicit, explicit = adapted(total_steps=STEPS), adapted(total_steps=STEPS)
    plain_loop(implicit, 8)
    plain_loop(explicit, 8, also_explicit=True)
    for ours, theirs in zip(implicit.state_dict().values(), explicit.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_unknown_length_takes_the_published_steps_with_one_warning():
    model = adapted()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plain_loop(model, 2)
    assert len([w for w in caught if "length of the run is unknown" in str(w.message)]) == 1
    assert merge_steps(model) == {"q_proj": [], "v_proj": []}


def test_a_fraction_without_a_known_length_is_an_error_before_anything_moves():
    model = adapted(merge_start=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"merge_start=0\.1 is a fraction.*set total_steps"):
        plain_loop(model, 1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_copied_model_goes_on_merging_and_leaves_the_original_alone():
    model = adapted(total_steps=STEPS)
    plain_loop(model, 4)  # one merge taken, two to come
    twin = copy.deepcopy(model)
    plain_loop(twin, STEPS - 4)
    assert merge_steps(twin) == {"q_proj": DEFAULT_STEPS, "v_proj": DEFAULT_STEPS}
    assert merge_steps(model) == {"q_proj": DEFAULT_STEPS[:1], "v_proj": DEFAULT_STEPS[:1]}
    assert all(B.step == 4 for B in groups(model).values())


# ---------------------------------------------------------------------- Trainer


def test_trainer_knows_the_length_without_a_call_from_the_user(tmp_path):
    model = adapted()
    trainer = Trainer(model, arguments(tmp_path), train_dataset=dataset(10))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert merge_steps(model) == {"q_proj": DEFAULT_STEPS, "v_proj": DEFAULT_STEPS}
    assert not [w for w in caught if "ASLoRA" in str(w.message) or "merges" in str(w.message)]


@pytest.mark.parametrize(("warmup", "expected"), [(4, [6, 7, 8]), (0.06, [4, 6, 7]), (20, DEFAULT_STEPS)])
def test_the_defaults_wait_for_the_trainers_warm_up(tmp_path, warmup, expected):
    """In the first step of a warm-up the learning rate is 0; a share of the run counts as the Trainer counts it."""
    model = adapted()
    trainer = Trainer(model, arguments(tmp_path, warmup_steps=warmup), train_dataset=dataset(10))
    trainer.train()
    assert model.base_model.run.warmup_steps["default"] == (2 if warmup == 0.06 else warmup)
    assert merge_steps(model) == {"q_proj": expected, "v_proj": expected}
    assert all(merge["distance"] > 0 for merge in model.base_model.sharing_report().merges)
    assert all("after the warm-up" in warning for warning in model.base_model.sharing_report().warnings)


def test_a_run_of_twelve_steps_takes_all_merges_at_distances(tmp_path):
    model = adapted(layers=8)
    Trainer(model, arguments(tmp_path, max_steps=12, warmup_steps=0.06), train_dataset=dataset(10)).train()
    report = model.base_model.sharing_report()
    assert {p["merges_taken"] for p in report.projections} == {5}
    assert all(merge["distance"] > 0 for merge in report.merges)
    assert report.merges[-1]["step"] <= 9
    assert any("after the same step" in warning for warning in report.warnings)


def test_trainer_counts_optimizer_steps_under_accumulation_and_clipping(tmp_path):
    model = adapted(merge_start=100, merge_interval=1)  # the averages stay: no merge in this run
    oracle = MeanOfB(model)

    class Note(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            oracle.note()

    args = arguments(tmp_path, max_steps=6, gradient_accumulation_steps=3, max_grad_norm=0.1)
    trainer = Trainer(model, args, train_dataset=dataset(12), callbacks=[Note()])
    with pytest.warns(UserWarning, match="6 merges of adapter 'default' not done.*step 103"):
        trainer.train()
    oracle.check(steps=6)


def test_trainer_in_bf16_keeps_float32_averages(tmp_path):
    model = adapted(dtype=torch.bfloat16, merge_start=100, merge_interval=1)
    with pytest.warns(UserWarning, match="not done"):
        Trainer(model, arguments(tmp_path, max_steps=2, bf16=True), train_dataset=dataset(4)).train()
    for B in groups(model).values():
        assert B.stacked_B.dtype == B.average.dtype == torch.float32
        assert B.average.abs().max() > 0


# ---------------------------------------------------------------------- accelerate, GradScaler


def test_accelerate_accumulation_counts_each_real_step_once():
    model = adapted(merge_start=100, merge_interval=1)
    oracle = MeanOfB(model)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    prepared, optimizer, loader, scheduler = accelerator.prepare(
        model, optimizer, DataLoader(tokens(8), batch_size=1), scheduler
    )
    for batch in loader:
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(input_ids=batch, labels=batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if accelerator.sync_gradients:
                oracle.note()
    oracle.check(steps=4)


@pytest.mark.parametrize("fused", [False, True])
def test_gradscaler_steps_that_are_skipped_do_not_count(fused):
    model = adapted(merge_start=100, merge_interval=1)
    oracle = MeanOfB(model)
    parameters = trainable(model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step, batch in enumerate(tokens(10).split(2)):
        optimizer.zero_grad()
        scaler.scale(model(input_ids=batch, labels=batch).loss).backward()
        overflows = step in (0, 3)
        if overflows:
            parameters[-1].grad.view(-1)[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        if not overflows:
            oracle.note()
    assert scaler.get_scale() == 1.0  # it halved the scale twice: it saw both overflows
    oracle.check(steps=3)


def test_nonfinite_gradient_skips_the_whole_step_and_is_counted():
    """Without a GradScaler: one bad gradient, and no parameter, moment or count moves."""
    model = adapted(total_steps=STEPS, modules_to_save=["lm_head"])
    optimizer = plain_loop(model, 2)
    batch = tokens(2)
    model(input_ids=batch, labels=batch).loss.backward()
    groups(model)["v_proj"].stacked_B.grad[1, 2, 3] = float("nan")

    def everything():
        moments = [t.clone() for state in optimizer.state.values() for t in state.values()]
        return [*(t.clone() for t in model.state_dict().values()), *moments]

    before = everything()
    with pytest.warns(UserWarning, match="inf or nan"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    assert model.base_model.nonfinite_steps == 1


# ---------------------------------------------------------------------- gradient checkpointing


def gradients(checkpointing, maps=None):
    model = adapted(dtype=torch.float64, init_weights=False)
    if maps is not None:
        for B in groups(model).values():
            B.assign(B.stacked_B, maps)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.enable_input_require_grads()
        assert model.is_gradient_checkpointing
    model.train()
    batch = tokens(2)
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("maps", [None, [1, 1, 3, 3, 4]], ids=["apart", "shared"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_gives_the_same_gradients(reentrant, maps):
    plain_loss, plain = gradients(None, maps)
    loss, checkpointed = gradients(reentrant, maps)
    assert loss == plain_loss
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert gradient.abs().max() > 1e-6
        # The sums over layers are taken in another order, no more than that.
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-11, atol=1e-14, msg=name)
        if maps is not None and name.endswith(".stacked_B"):
            assert not gradient[[0, 2]].any()


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_in_a_trainer_takes_the_same_merges(tmp_path, reentrant):
    def train(**fields):
        model = adapted(dtype=torch.float64)
        if fields:
            model.enable_input_require_grads()
        Trainer(model, arguments(tmp_path, **fields), train_dataset=dataset(10)).train()
        return model

    plain = train()
    checkpointed = train(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert merge_steps(checkpointed) == {"q_proj": DEFAULT_STEPS, "v_proj": DEFAULT_STEPS}
    for name, B in groups(checkpointed).items():
        expected = groups(plain)[name]
        assert B.sharing_map == expected.sharing_map
        torch.testing.assert_close(B.stacked_B, expected.stacked_B, rtol=1e-8, atol=1e-10)
