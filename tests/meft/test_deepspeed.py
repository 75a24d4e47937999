"""Two gloo processes in DeepSpeed's ZeRO, stages 1 to 3: rows equal those of one process with the joint batch.

The processes run this file as a script, once for all tests (`python test_deepspeed.py RANK FOLDER`).
"""

import gc
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file

from aslora_meft.training.checkpoints import check_whole
from meft import RowAdamW
from tests.support import zero
from tests.support.processes import once, result_of, run_ranks, saved_by_ranks, work_as_rank
from tests.support.tiny_meft import Tiny

pytestmark = [pytest.mark.slow, zero.MISSING]
STEPS = 4
TORCH_OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
CASES = {
    "1": (1,),
    "2 accumulating": (2, 2),
    "3": (3,),
    "2 bf16": (2, 1, "bf16"),
    "3 fp16": (3, 1, "fp16"),
    "2 offloaded": (2, 1, None, TORCH_OFFLOAD),
    "3 offloaded": (3, 1, None, TORCH_OFFLOAD),
    "2 shared": (2,),  # one copy of the rows for both ranks
    "3 shared": (3,),
}
SAMPLES = [{"input_ids": row, "labels": row} for step in range(6) for row in Tiny.batch(4, 6, seed=50 + step)]


def adapted(seed=0):
    """The base is the same whatever the seed."""
    model = Tiny.adapted(2, torch.float32, seed=seed)
    base = {k: v for k, v in Tiny.adapted(2, torch.float32).get_base_model().state_dict().items() if ".meft_" not in k}
    model.get_base_model().load_state_dict(base, strict=False)
    return model


def joint(number):
    return Tiny.batch(4, 6, seed=50 + number)


def state_of(model):
    """Whole parameters, rows, moments and counts."""
    state = zero.full(model)
    for number, table in enumerate(Tiny.tables(model)):
        table.synchronize()
        state[f"rows {number}"] = table.masters.clone()
        if table.moments is not None:
            state |= {f"{name} {number}": v.clone() for name, v in table.moments.tensors().items()}
    return state


def plain(accumulate=1):
    model = adapted()
    optimizer = zero.adamw(model)
    schedule, norms = zero.falling(optimizer), []
    for step in range(STEPS):
        for part in range(accumulate):
            batch = joint(step * accumulate + part)
            (model(input_ids=batch, labels=batch).loss / accumulate).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(zero.trainable(model), zero.CLIP)))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return state_of(model), norms


# ---------------------------------------------------------------------- what the two processes do


def mine(rank, number):
    return joint(number)[2 * rank : 2 * rank + 2]


def run(engine, rank, steps, accumulate=1):
    norms = []
    for step in steps:
        for part in range(accumulate):
            batch = mine(rank, step * accumulate + part)
            engine.backward(engine(input_ids=batch, labels=batch).loss)
            engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    return norms


def run_and_resume(rank, folder, stage, accumulate=1, precision=None, fields=None):
    model = adapted(seed=rank)  # the first rank's rows come to the other
    begun = [table.masters.clone() for table in Tiny.tables(model)]
    engine = zero.engine(model, stage, accumulate, precision, **(fields or {}))
    kept = all(map(torch.equal, begun, [table.masters for table in Tiny.tables(model)]))
    norms = run(engine, rank, range(2), accumulate)
    engine.save_checkpoint(folder, exclude_frozen_parameters=True)
    engine.save_16bit_model(f"{folder}/16bit")
    then = [state_of(model)[f"rows {number}"] for number in range(4)]
    norms += run(engine, rank, range(2, STEPS), accumulate)
    other = adapted(seed=7)
    resumed = zero.engine(other, stage, accumulate, precision, **(fields or {}))
    resumed.load_checkpoint(folder, load_module_strict=False)
    run(resumed, rank, range(2, STEPS), accumulate)
    state, again = state_of(model), state_of(other)
    return {
        "state": state, "norms": norms, "kept": kept, "then": then, "equal": zero.same_on_all_ranks(state),
        "resumed": [name for name in state if not torch.equal(state[name], again[name])],
        "read_as": Tiny.tables(model)[0].compute_dtype,
    }  # fmt: skip


def run_shared(*arguments):
    os.environ["ASLORA_MEFT_SHARE_ROWS"] = "1"
    try:
        return run_and_resume(*arguments)
    finally:
        del os.environ["ASLORA_MEFT_SHARE_ROWS"]


def run_nonfinite(rank, stage, precision):
    """Of one rank's rows, then of one rank's router."""
    model = adapted()
    engine = zero.engine(model, stage, 1, precision)
    run(engine, rank, range(1))
    before, moved = state_of(model), []
    for value in ("rows", "router"):
        loss = engine(input_ids=mine(rank, 1), labels=mine(rank, 1)).loss
        hook = (
            Tiny.layers(model)[0]
            .router("default")
            .register_hook(lambda g, factor=float("inf") if rank and value == "router" else 1.0: g * factor)
        )
        engine.backward(loss)
        hook.remove()
        if rank == 0 and value == "rows":
            Tiny.tables(model)[1].rows.grad.mul_(float("nan"))
        engine.step()
        after = state_of(model)
        moved += [name for name in before if not torch.equal(before[name], after[name])]
    counted = model.base_model.nonfinite_steps
    run(engine, rank, range(1, 2))
    after = state_of(model)
    left = sum(torch.equal(before[name], after[name]) for name in before)
    return {"moved": moved, "skipped": engine.skipped_steps, "counted": counted, "left": left}


def run_refusals():
    made = {"stage 0": zero.refusal(lambda: zero.engine(adapted(), 0))}
    model = adapted()
    made["RowAdamW"] = zero.refusal(lambda: zero.engine(model, 2, optimizer=RowAdamW(zero.trainable(model), lr=1e-2)))
    model = adapted()
    made["SGD"] = zero.refusal(lambda: zero.engine(model, 2, optimizer=torch.optim.SGD(zero.trainable(model), lr=1e-2)))
    rows = [p for n, p in model.named_parameters() if n.endswith(".rows")]
    groups = [{"params": rows}, {"params": [p for n, p in model.named_parameters() if "meft_router" in n]}]
    made["rows alone"] = zero.refusal(lambda: zero.engine(model, 2, optimizer=torch.optim.AdamW(groups)))
    gc.collect()
    made["shown"] = sum(n.endswith(".rows") for n, _ in model.named_parameters())
    injected = inject_adapter_in_model(Tiny.config(), Tiny.base(2, torch.float32))
    made["injected"] = zero.refusal(lambda: zero.engine(injected, 2))
    return made


def run_to_the_end_of_an_engine(rank):
    """While it lives, no rows are parameters; afterwards they are again, and train on."""
    model = adapted()
    engine = zero.engine(model, 2)
    hidden = [n for n, _ in model.named_parameters() if n.endswith(".rows")]
    run(engine, rank, range(1))
    engine.destroy()
    del engine
    gc.collect()
    shown = [n for n, _ in model.named_parameters() if n.endswith(".rows")]
    before = Tiny.tables(model)[0].masters.clone()
    Tiny.train(model, 1)
    return {"hidden": hidden, "shown": len(shown), "moved": not torch.equal(before, Tiny.tables(model)[0].masters)}


def run_in_parts(rank, folder):
    """Stage 3 with a base that each rank has loaded a part of, and with one that was loaded whole."""
    whole = Tiny.base(2, torch.float32)
    states = []
    for base in (zero.loaded_in_parts(whole, rank, folder), whole):
        torch.manual_seed(5)
        model = get_peft_model(base, Tiny.config(master_dtype="float32"))
        Tiny.enlarge(model)
        begun = [table.masters.clone() for table in Tiny.tables(model)]
        run(zero.engine(model, 3), rank, range(2))
        states.append(state_of(model))
    parts, wanted = states
    moved = not any(torch.equal(begun[number], wanted[f"rows {number}"]) for number in range(4))
    return {"differ": [name for name in wanted if not torch.equal(parts[name], wanted[name])], "moved": moved}


def run_in_trainer(rank, folder, stage, **sections):
    model = adapted()
    losses = zero.run_trainer(model, f"{folder}/a", SAMPLES, stage=stage, **sections)
    resumed = zero.run_trainer(adapted(7), f"{folder}/b", SAMPLES, f"{folder}/a/checkpoint-2", stage, **sections)
    twice = zero.run_trainer(model, f"{folder}/c", SAMPLES, stage=stage, **sections)  # another engine, the same model
    return {"losses": losses, "resumed": resumed, "twice": twice}


OWN_OPTIMIZER = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}
OWN_OPTIMIZER["params"]["torch_adam"] = True
OWN_SCHEDULER = dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto")
IN_TRAINER = {
    "1": {},
    "2": {"optimizer": OWN_OPTIMIZER},
    "3": {},
}


def work(rank, folder):
    tasks = {"start": partial(zero.start, rank)}
    for name, case in CASES.items():
        tasks[name] = partial(run_shared if "shared" in name else run_and_resume, rank, str(folder / name), *case)
    tasks |= {
        f"not finite {stage} {precision}": partial(run_nonfinite, rank, stage, precision)
        for stage, precision in NOT_FINITE
    }
    tasks |= {
        "in parts": partial(run_in_parts, rank, folder / "base"),
        "refused": run_refusals,
        "end": partial(run_to_the_end_of_an_engine, rank),
    }
    for stage, sections in IN_TRAINER.items():
        tasks[f"trainer {stage}"] = partial(run_in_trainer, rank, folder / f"trainer {stage}", int(stage), **sections)
    work_as_rank(rank, folder, tasks)


NOT_FINITE = [(1, None), (2, "bf16"), (3, "fp16"), (3, None)]


# ---------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def folder(request):
    return once(request, "meft_zero", partial(run_ranks, __file__))


@pytest.fixture(scope="module")
def ranks(folder):
    return saved_by_ranks(folder)


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process_and_resuming_is_exact(ranks, name):
    one, other = result_of(ranks, name)
    assert one["equal"]
    assert other["equal"]
    assert one["kept"]
    assert one["resumed"] == other["resumed"] == []
    precision = (*CASES[name], None, None)[2]
    wanted, norms = plain(2 if "accumulating" in name else 1)
    assert one["state"].keys() == wanted.keys()
    assert one["norms"] == pytest.approx(norms, rel=0.3 if precision else 1e-5)
    assert one["read_as"] == {"bf16": torch.bfloat16, "fp16": torch.float16, None: torch.float32}[precision]
    for key, value in wanted.items():
        assert one["state"][key].dtype == (value.dtype if "router" not in key else one["state"][key].dtype)
        if precision is None:
            torch.testing.assert_close(one["state"][key], value, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["1", "3", "3 shared"])
def test_a_checkpoint_has_rows_and_moments_once(ranks, folder, name):
    then = result_of(ranks, name)[0]["then"]
    path = folder / name / "global_step2"
    files = [torch.load(f, weights_only=False)["module"] for f in sorted(path.glob("*model_states.pt"))]
    with_rows = [state for state in files if any(key.endswith(".rows") for key in state)]
    assert len(with_rows) == 1
    whole = torch.load(folder / name / "16bit" / "pytorch_model.bin", weights_only=False)
    for state in (with_rows[0], whole):
        saved = [value for key, value in state.items() if key.endswith(".rows")]
        assert len(saved) == len(then)
        assert all(map(torch.equal, saved, then))
    assert len(list(path.glob("meft_state*.safetensors"))) == 1
    moments = load_file(next(iter(path.glob("meft_state*.safetensors"))))
    assert len(moments) == 3 * len(then)


@pytest.mark.parametrize(("stage", "precision"), NOT_FINITE)
def test_a_step_that_is_not_finite_changes_nothing(ranks, stage, precision):
    for result in result_of(ranks, f"not finite {stage} {precision}"):
        assert result == {"moved": [], "skipped": 2, "counted": 2, "left": 0}


def test_what_cannot_be_followed_is_refused_before_the_first_step(ranks):
    made = result_of(ranks, "refused")[0]
    assert "zero_optimization.stage=0 (set 1, 2 or 3)" in made["stage 0"]
    assert "RowAdamW cannot step rows in DeepSpeed" in made["RowAdamW"]
    assert "SGD is neither" in made["SGD"]
    assert "nothing but MEFT's rows" in made["rows alone"]
    assert made["shown"] == 4  # after all refusals
    assert "get_peft_model" in made["injected"]


def test_rows_are_parameters_again_when_the_engine_is_gone(ranks):
    for result in result_of(ranks, "end"):
        assert result == {"hidden": [], "shown": 4, "moved": True}


def test_a_base_that_transformers_has_loaded_in_parts(ranks):
    for result in result_of(ranks, "in parts"):
        assert result == {"differ": [], "moved": True}


@pytest.mark.parametrize("stage", IN_TRAINER)
def test_in_a_trainer(ranks, folder, tmp_path, stage):
    alone = zero.run_trainer(model := adapted(), tmp_path / "once", SAMPLES, ranks=1)
    twice = zero.run_trainer(model, tmp_path / "twice", SAMPLES, ranks=1)
    for result in result_of(ranks, f"trainer {stage}"):
        assert result["losses"] == pytest.approx(alone, rel=1e-5)
        assert result["resumed"] == result["losses"]
        assert result["twice"] == pytest.approx(twice, rel=1e-4)
    last = folder / f"trainer {stage}" / "a" / "checkpoint-6"
    check_whole(last)
    wanted = load_file(tmp_path / "once" / "checkpoint-6" / "adapter_model.safetensors")
    saved = load_file(last / "adapter_model.safetensors")
    assert wanted.keys() == saved.keys()
    for name, value in wanted.items():
        if "digest" not in name:
            torch.testing.assert_close(saved[name], value, rtol=1e-5, atol=1e-5)
    loaded = PeftModel.from_pretrained(Tiny.base(2, torch.float32), last)
    assert torch.equal(Tiny.tables(loaded)[0].masters, saved[f"base_model.model.{MLP}.meft_keys.rows"])


MLP = "model.layers.0.mlp"

if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
