"""Two gloo processes in DeepSpeed's ZeRO, stages 1 to 3: merges and values of one process with the joint batch.

The processes run this file as a script, once for all tests (`python test_deepspeed.py RANK FOLDER`).
"""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from aslora import ASLoRAConfig
from tests.support import zero
from tests.support.processes import once, result_of, run_ranks, saved_by_ranks, work_as_rank
from tests.support.tiny_aslora import Tiny
from tests.support.tiny_meft import Tiny as TinyLlama

pytestmark = [pytest.mark.slow, zero.MISSING]
STEPS = 6  # merges at 2 and 4
OFFLOADED = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
CASES = {
    "1 upper": (1, "upper", None),
    "2 mean": (2, "mean", None),
    "3 mean": (3, "mean", None),
    "2 upper offloaded": (2, "upper", None, OFFLOADED),
    "3 mean offloaded": (3, "mean", None, OFFLOADED),
    "1 mean bf16": (1, "mean", "bf16"),
    "3 upper bf16": (3, "upper", "bf16"),
    "3 mean diagonals": (3, "mean", None, {}, True),
}
SAMPLES = [{"input_ids": row, "labels": row} for step in range(6) for row in TinyLlama.batch(4, 6, seed=50 + step)]


def adapted(value="mean", **fields):
    return Tiny.adapted(dtype=torch.float32, num_merges=2, merge_value=value, **fields)


def joint(step):
    return torch.randn(4, Tiny.WIDTH, generator=torch.Generator().manual_seed(100 + step))


def plain(value, use_diagonal=False):
    model = adapted(value, use_diagonal=use_diagonal)
    optimizer = zero.adamw(model)
    schedule = zero.falling(optimizer)
    for step in range(STEPS):
        model(joint(step)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(zero.trainable(model), zero.CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def llama(seed=0, base=None, **others):
    base = TinyLlama.base(4, torch.float32) if base is None else base
    torch.manual_seed(seed)
    fields = {"num_merges": 2, "merge_start": 0, "merge_interval": 2, "merge_value": "mean", "init_weights": False}
    config = ASLoRAConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], **(fields | others))
    return get_peft_model(base, config)


# ---------------------------------------------------------------------- what the two processes do


def run(engine, rank, steps):
    dtype = next(engine.module.parameters()).dtype
    for step in steps:
        engine.backward(engine(joint(step)[2 * rank : 2 * rank + 2].to(dtype)).square().mean())
        engine.step()


def sharing(model):
    groups = Tiny.groups(model).values()
    return {"maps": Tiny.maps(model), "merges": [B.merges() for B in groups], "average": [B.average for B in groups]}


def run_and_resume(rank, folder, stage, value, precision, fields=None, use_diagonal=False):
    """Also from checkpoints of exactly a merge step, and of the step after."""
    model = adapted(value, use_diagonal=use_diagonal)
    engine = zero.engine(model, stage, 1, precision, **(fields or {}))
    run(engine, rank, range(2))
    engine.save_checkpoint(f"{folder}/2", exclude_frozen_parameters=True)
    run(engine, rank, range(2, 3))
    engine.save_checkpoint(f"{folder}/3", exclude_frozen_parameters=True)
    run(engine, rank, range(3, STEPS))
    state = zero.full(model)
    results = {"state": state, "equal": zero.same_on_all_ranks(state), **sharing(model), "resumed": []}
    for done in (2, 3):
        other = adapted(value, use_diagonal=use_diagonal)
        engine = zero.engine(other, stage, 1, precision, **(fields or {}))
        engine.load_checkpoint(f"{folder}/{done}", load_module_strict=False)
        run(engine, rank, range(done, STEPS))
        results["resumed"].append((zero.full(other), sharing(other)))
    return results


def run_nonfinite(rank, stage):
    """A gradient that is inf on one rank: nothing moves, and no step is counted."""
    model = adapted()
    engine = zero.engine(model, stage)
    run(engine, rank, range(1))
    before = zero.full(model)
    loss = engine(joint(1)[2 * rank : 2 * rank + 2]).square().mean()
    engine.backward(loss * (float("inf") if rank else 1.0))
    engine.step()
    after, B = zero.full(model), Tiny.groups(model)["q"]
    return {"moved": [n for n in before if not torch.equal(before[n], after[n])], "skipped": engine.skipped_steps,
            "counted": model.base_model.nonfinite_steps, "step": B.step}  # fmt: skip


def run_refusals():
    class Lamb(torch.optim.AdamW):
        pass

    class MovesBetween(torch.optim.AdamW):
        pass

    MovesBetween.__module__ = "schedulefree"
    made = {}
    for name, kind in (("norms", Lamb), ("between", MovesBetween)):
        model = adapted()
        made[name] = zero.refusal(partial(zero.engine, model, 2, optimizer=zero.adamw(model, kind)))
    made["nvme"] = zero.refusal(
        partial(zero.engine, adapted(), 3, offload_optimizer={"device": "nvme", "nvme_path": "/nowhere"})
    )
    made["stage 0"] = zero.refusal(partial(zero.engine, adapted(), 0, 1, "bf16"))
    return made


def run_stage_0(rank):
    """An engine that steps the parameters themselves: torch's hooks see it."""
    model = adapted()
    run(zero.engine(model, 0), rank, range(STEPS))
    return {"state": zero.full(model), **sharing(model)}


def run_in_parts(rank, folder):
    """Stage 3 with a base that each rank has loaded a part of, and with one that was loaded whole; A counts too."""
    whole = TinyLlama.base(4, torch.float32)
    states, merges = [], 0
    for base in (zero.loaded_in_parts(whole, rank, folder), whole):
        model = llama(base=base, similarity="product", merge_interval=1)
        engine = zero.engine(model, 3)
        for step in range(3):
            batch = TinyLlama.batch(4, 6, seed=step)[2 * rank : 2 * rank + 2]
            engine.backward(engine(input_ids=batch, labels=batch).loss)
            engine.step()
        states.append(zero.full(model))
        merges = max(B.merges_taken for B in model.base_model.shared_b("default").values())
    parts, wanted = states
    return {"differ": [name for name in wanted if not torch.equal(parts[name], wanted[name])], "merges": merges}


def run_in_trainer(rank, folder, stage, **sections):
    losses = zero.run_trainer(llama(), f"{folder}/a", SAMPLES, stage=stage, **sections)
    resumed = zero.run_trainer(llama(7), f"{folder}/b", SAMPLES, f"{folder}/a/checkpoint-2", stage, **sections)
    return {"losses": losses, "resumed": resumed}


OWN_OPTIMIZER = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}
OWN_OPTIMIZER["params"]["torch_adam"] = True
IN_TRAINER = {"2": {}, "3": {"optimizer": OWN_OPTIMIZER}}


def work(rank, folder):
    zero_tasks = {
        f"resumed {name}": partial(run_and_resume, rank, folder / name, *case) for name, case in CASES.items()
    }
    zero_tasks |= {f"not finite {stage}": partial(run_nonfinite, rank, stage) for stage in (1, 2, 3)}
    zero_tasks |= {
        "in parts": partial(run_in_parts, rank, folder / "base"),
        "refused": run_refusals,
        "stage 0": partial(run_stage_0, rank),
    }
    zero_tasks |= {
        f"trainer {stage}": partial(run_in_trainer, rank, folder / f"trainer {stage}", int(stage), **sections)
        for stage, sections in IN_TRAINER.items()
    }
    work_as_rank(rank, folder, {"start": partial(zero.start, rank), **zero_tasks})


# ---------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def folder(request):
    return once(request, "aslora_zero", partial(run_ranks, __file__))


@pytest.fixture(scope="module")
def ranks(folder):
    return saved_by_ranks(folder)


def assert_same_sharing(given, wanted):
    assert given["maps"] == wanted["maps"]
    assert given["merges"] == wanted["merges"]
    assert all(map(torch.equal, given["average"], wanted["average"]))


@pytest.mark.parametrize("name", CASES)
def test_same_merges_as_one_process_and_resuming_is_exact(ranks, name):
    one, other = result_of(ranks, f"resumed {name}")
    assert one["equal"]
    assert other["equal"]
    _, value, precision, *more = CASES[name]
    alone = plain(value, *more[1:])
    assert one["maps"] == Tiny.maps(alone)
    taken = [[merge[:3] for merge in B.merges()] for B in Tiny.groups(alone).values()]
    assert [[merge[:3] for merge in merges] for merges in one["merges"]] == taken
    assert sum(map(len, taken)) == 4
    for name, value in zero.full(alone).items():
        difference = (one["state"][name].float() - value).abs()
        assert difference.mean() < 1e-3 if precision else difference.max() < 1e-6
    for owners, key in ((B.ties.owners, n) for (n, B) in named_groups(alone)):  # layers that share have equal bits
        rows = one["state"][key]
        assert all(torch.equal(rows[row], rows[owner]) for row, owner in enumerate(owners))
    for state, shared in one["resumed"]:
        assert all(torch.equal(state[n], one["state"][n]) for n in state)
        assert_same_sharing(shared, one)


def named_groups(model):
    Bs = {id(B.stacked_B): B for B in Tiny.groups(model).values()}
    return [(name, Bs[id(p)]) for name, p in model.named_parameters() if id(p) in Bs]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_that_is_not_finite_changes_nothing(ranks, stage):
    for result in result_of(ranks, f"not finite {stage}"):
        assert result == {"moved": [], "skipped": 1, "counted": 1, "step": 1}


def test_what_cannot_be_followed_is_refused_before_the_first_step(ranks):
    made = result_of(ranks, "refused")[0]
    assert "scales its steps by norms" in made["norms"]
    assert "between its steps" in made["between"]
    assert "offload_optimizer.device=nvme (set 'cpu' or 'none')" in made["nvme"]
    assert "zero_optimization.stage=0 (set 1, 2 or 3)" in made["stage 0"]


def test_a_base_that_transformers_has_loaded_in_parts(ranks):
    for result in result_of(ranks, "in parts"):
        assert result == {"differ": [], "merges": 2}


def test_stage_0_in_float32_is_seen_by_the_hooks(ranks):
    alone = plain("mean")
    for result in result_of(ranks, "stage 0"):
        assert result["maps"] == Tiny.maps(alone)
        for name, value in zero.full(alone).items():
            torch.testing.assert_close(result["state"][name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stage", IN_TRAINER)
def test_in_a_trainer(ranks, folder, tmp_path, stage):
    alone = zero.run_trainer(llama(), tmp_path, SAMPLES, ranks=1)
    for result in result_of(ranks, f"trainer {stage}"):
        assert result["losses"] == pytest.approx(alone, rel=1e-5)
        assert result["resumed"] == result["losses"]
    here, there = (Path(where) / "checkpoint-6" for where in (tmp_path, folder / f"trainer {stage}" / "a"))
    wanted, saved = (load_file(path / "adapter_model.safetensors") for path in (here, there))
    assert wanted.keys() == saved.keys()
    for name, value in wanted.items():
        if value.is_floating_point():
            torch.testing.assert_close(saved[name], value, rtol=1e-5, atol=1e-5)
        elif "digest" not in name:
            assert torch.equal(saved[name], value), name
    again = load_file(folder / f"trainer {stage}" / "b" / "checkpoint-6" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], saved[name]) for name in saved)


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
