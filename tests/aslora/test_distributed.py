"""Two gloo processes: DDP and FSDP2 take the merges of one process with the joint batch, and stay equal to each other.

The processes run this file as a script, once for all tests (`python test_distributed.py RANK FOLDER`).
"""

import copy
import os
import re
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from transformers import Trainer, TrainingArguments

from aslora import ASLoRAConfig
from meft import MEFTConfig
from tests.support import training
from tests.support.fsdp2 import accelerator, by_hand, forget, fsdp2_on_cpu, whole
from tests.support.models import llama
from tests.support.processes import once, result_of, run_ranks, saved_by_ranks, work_as_rank
from tests.support.training import adamw, assert_close, assert_equal, trainable

pytestmark = pytest.mark.slow  # two processes, for all of them
WORLD, STEPS, LAYERS = 2, 8, 5
WEIGHTS = "adapter_model.safetensors"


def adapted(dtype=torch.float64, **fields):
    """Five layers, so that FSDP2 shards the rows of B unevenly; of up_proj one layer alone: fewer rows than ranks."""
    targets = r".*\.q_proj|.*\.down_proj|.*\.4\.mlp\.up_proj"
    # Merges at 2, 4, 6: three of them in eight steps, so that training goes on after the last.
    adapter = ASLoRAConfig(
        r=3, lora_alpha=6, target_modules=targets, merge_start=0, merge_interval=2, total_steps=STEPS, **fields
    )
    return get_peft_model(llama(LAYERS, dtype, use_cache=False), adapter)


def batches():
    """For each step the joint batch [WORLD * 2, 8]; each rank takes its two rows."""
    return torch.randint(64, (STEPS, WORLD * 2, 8), generator=torch.Generator().manual_seed(1))


def train(model, rank=None, optimizer=None, steps=range(STEPS)):
    """Rank None sees the joint batch."""
    optimizer = optimizer or adamw(model)
    rows = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
    training.train(model, batches()[list(steps)][:, rows], optimizer)
    return optimizer


def state_of(model):
    """The adapter's tensors, whole."""
    state = {}
    for name, value in model.state_dict().items():
        if ".aslora_" in name:
            state[name] = (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
    return state


def merges_of(model):
    return [(m["step"], m["projection"], m["lower"], m["upper"]) for m in model.base_model.sharing_report().merges]


# ---------------------------------------------------------------------- what the two processes do


def run_ddp(rank):
    model = adapted()
    if rank == 1:  # DDP brings the weights of rank 0 to all
        with torch.no_grad():
            for A in model.base_model.aslora_A["default"].parameters():
                A.add_(1)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)  # find_unused_parameters=False
    train(wrapped, rank)
    return {"state": state_of(model), "merges": merges_of(model)}


def collectives():
    """Number of collectives that this rank has begun on the default group."""
    return torch.distributed.group.WORLD._get_sequence_number_for_group()


def run_apart(rank):
    """No DDP: rank 0 trains while rank 1 is elsewhere, then both with batches of their own and numbers of their own."""
    before = collectives()
    model = adapted()
    optimizer = train(model, rank, steps=range(2)) if rank == 0 else None
    train(model, rank, optimizer, steps=range(2, 4 + rank))
    return {"begun": collectives() - before, "state": state_of(model)}


def run_sharded_apart(rank):
    """Each rank shards a model over a mesh of its own; one of them has a step whose gradient is inf."""
    mesh = init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("model", "shard"))["shard"]
    before = collectives()
    model = adapted()
    fully_shard(model, mesh=mesh)
    optimizer = train(model, rank, steps=range(2 + rank))
    if rank == 0:
        (model(input_ids=batches()[3]).logits.sum() * float("inf")).backward()
        optimizer.step()
    return {"begun": collectives() - before, "skipped": model.base_model.nonfinite_steps}


def train_on(model, rank=None):
    """Three steps after all merges, of an optimizer without moments."""
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    train(model, rank, optimizer, steps=range(3))


def run_broadcast(rank):
    """Rank 0 has a trained model, the others get its parameters: they compute and train as it does."""
    model = adapted()
    train(model)
    if rank > 0:
        model = adapted()
    for parameter in model.parameters():
        torch.distributed.broadcast(parameter.data, 0)
    with torch.no_grad():
        logits = model(input_ids=batches()[0]).logits
    maps = [B.sharing_map for B in model.base_model.shared_b("default").values()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the ranks without a map find it
        train_on(torch.nn.parallel.DistributedDataParallel(model), rank)
    rows = [(B.stacked_B.detach(), B.ties.owners) for B in model.base_model.shared_b("default").values()]
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {"logits": logits, "maps": maps, "parameters": parameters, "rows": rows}


def run_nonfinite(rank):
    """A loss that is bad on rank 1 alone: DDP averages it into the gradients of all ranks."""
    model = adapted()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = train(wrapped, rank, steps=range(3))
    before = state_of(model)
    moments = [t.clone() for state in optimizer.state.values() for t in state.values()]
    batch = batches()[3]
    loss = wrapped(input_ids=batch, labels=batch).loss
    (loss * (float("nan") if rank == 1 else 1)).backward()
    begun = collectives()
    optimizer.step()
    begun = collectives() - begun
    optimizer.zero_grad()
    after = state_of(model)
    same = all(torch.equal(after[name], before[name]) for name in before)
    same_moments = all(
        torch.equal(a, b)
        for a, b in zip(moments, (t for state in optimizer.state.values() for t in state.values()), strict=True)
    )
    skipped = model.base_model.nonfinite_steps
    train(wrapped, rank, optimizer, steps=range(3, STEPS))
    return {"same": same, "same_moments": same_moments, "skipped": skipped, "begun": begun, "state": state_of(model)}


def trained_in_parts(model, micro_batches):
    """Train; of each step the micro-batches, each with its context. Returns the norms."""
    optimizer, norms = adamw(model), []
    for step in micro_batches:
        for context, batch in step:
            with context:
                (model(input_ids=batch, labels=batch).loss / len(step)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trainable(model), 0.01)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def run_accumulation(rank):
    """Two micro-batches a step, the first without synchronising, with clipping."""
    model = adapted()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    mine = batches()[:, 2 * rank : 2 * rank + 2]
    pairs = zip(mine[::2], mine[1::2], strict=True)
    norms = trained_in_parts(wrapped, [[(wrapped.no_sync(), one), (nullcontext(), other)] for one, other in pairs])
    return {"state": state_of(model), "norms": norms}


def of_other_sizes(step, rank):
    """Ids and mask; the second rank's batch is padding alone in one step."""
    ids = batches()[step, : 1 + rank, : 5 + 3 * rank]
    return ids, torch.ones_like(ids) if step != 1 or rank == 0 else torch.zeros_like(ids)


def train_on_other_sizes(model, ranks):
    optimizer = adamw(model)
    for step in range(4):
        for rank in ranks:
            ids, mask = of_other_sizes(step, rank)
            loss = model(input_ids=ids, attention_mask=mask).logits.nan_to_num().square().mean()
            (loss / len(ranks)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return state_of(model)


def run_other_sizes(rank):
    model = adapted()
    train_on_other_sizes(torch.nn.parallel.DistributedDataParallel(model), [rank])
    return {"state": state_of(model)}


def saved(model, optimizer):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


def gone_on(state, rank=None):
    """Train to the end from a state; rank None is one process alone."""
    model = adapted()
    model.load_state_dict(state[0])
    optimizer = adamw(model)
    optimizer.load_state_dict(state[1])
    wrapped = model if rank is None else torch.nn.parallel.DistributedDataParallel(model)
    train(wrapped, rank, optimizer, steps=range(3, STEPS))
    return {"state": state_of(model), "merges": merges_of(model)}


def run_resumed(rank):
    """What both ranks have in the middle of a run, and how they go on from one process's state."""
    model = adapted()
    optimizer = train(torch.nn.parallel.DistributedDataParallel(model), rank, steps=range(3))
    middle = saved(model, optimizer)
    model = adapted()
    return {"middle": middle, **gone_on(saved(model, train(model, steps=range(3))), rank)}


# Of each epoch in `join()` the batches of both ranks; the merges are at 2, 4 and 6.
UNEVEN = [[0, 3], [4, 2]]


def uneven_batch(rank, step):
    return batches()[step, 2 * rank : 2 * rank + 2]


def run_uneven(rank):
    """What a rank has after each epoch, and after a step of all; and the error where their rates are other ones."""
    model, error = adapted(), "none"
    wrapped, optimizer, done, found = torch.nn.parallel.DistributedDataParallel(model), adamw(model), 0, []
    for counts in [*UNEVEN, None]:
        with wrapped.join() if counts else nullcontext():
            for i in range(counts[rank] if counts else 1):
                batch = uneven_batch(rank, done + i)
                wrapped(input_ids=batch, labels=batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        done += max(counts) if counts else 0
        found.append((state_of(model), merges_of(model)))
        if done == 7 and counts:
            model.base_model.run.units["default"][0].leader.clock[2] = 0  # as if merges were to come
            optimizer.param_groups[0]["lr"] /= 1 + rank
            try:
                wrapped.join()
            except RuntimeError as raised:
                error = str(raised)
            optimizer.param_groups[0]["lr"] *= 1 + rank
            model.base_model.run.units["default"][0].leader.clock[2] = 1
    return {"epochs": found, "error": error}


def uneven_as_one_process():
    model = adapted()
    optimizer, done, found = adamw(model), 0, []
    for counts in [*UNEVEN, [1, 1]]:
        for i in range(max(counts)):
            for rank in (rank for rank in range(WORLD) if i < counts[rank]):
                batch = uneven_batch(rank, done + i)
                (model(input_ids=batch, labels=batch).loss / WORLD).backward()
            optimizer.step()
            optimizer.zero_grad()
        done += max(counts)
        found.append((state_of(model), merges_of(model)))
    return found


def run_fsdp(rank, folder):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    model = adapted()
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    train(model, rank)
    shards = {name: p.to_local().numel() for name, p in model.named_parameters() if p.requires_grad}
    # Two ways to save: every rank gathers by itself; or the first rank alone holds the whole state.
    model.save_pretrained(folder / "gathered", is_main_process=rank == 0)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    model.save_pretrained(folder / "whole", state_dict=whole, is_main_process=rank == 0)
    return {"state": state_of(model), "merges": merges_of(model), "shards": shards}


def run_fsdp_nonfinite(rank):
    model = adapted()
    fully_shard(model)
    optimizer = train(model, rank, steps=range(2))
    before = state_of(model)
    batch = batches()[2]
    model(input_ids=batch, labels=batch).loss.backward()
    if rank == 1:
        shard = next(p for p in model.parameters() if p.requires_grad and p.to_local().numel())
        shard.grad.to_local().view(-1)[0] = float("inf")
    optimizer.step()
    after = state_of(model)
    return {
        "same": all(torch.equal(after[name], before[name]) for name in before),
        "skipped": model.base_model.nonfinite_steps,
    }


def run_tensor_parallel(rank, folder):
    """What injection into a model of two parts says, of a model that transformers has parted, and by hand."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import LlamaForCausalLM

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
    }  # read when it is made
    try:
        from transformers.distributed import DistributedConfig

        how = {"distributed_config": DistributedConfig(tp_plan="auto")}
    except ImportError:  # before transformers 5.15
        how = {"tp_plan": "auto"}

    heads = {"num_key_value_heads": 2, "use_cache": False}
    if rank == 0:
        llama(1, **heads).save_pretrained(folder / "to part")
    torch.distributed.barrier()
    found = {}
    parted = LlamaForCausalLM.from_pretrained(folder / "to part", **how)
    sharded = fully_shard(llama(1, **heads), mesh=init_device_mesh("cpu", (WORLD,)))
    for name, model in (("tp", parted), ("fsdp", sharded)):
        for config in (ASLoRAConfig(target_modules=["q_proj"]), MEFTConfig(r=64)):
            before = [name for name, _ in model.named_parameters()]
            try:
                get_peft_model(model, config)
            except ValueError as error:
                same = before == [name for name, _ in model.named_parameters()]
                found[name, config.method] = f"{error} {'as it was' if same else 'changed'}"
    return found


def run_fsdp_resumed(rank, folder):
    """A sharded state after three steps and a merge; another model goes on from it."""
    model = by_hand(adapted())
    optimizer = train(model, rank, steps=range(3))
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"weights": weights, "moments": moments}, checkpoint_id=folder / "sharded")
    again = by_hand(adapted())
    train(again, rank, resumed(again, folder), steps=range(3, STEPS))
    return {"state": state_of(again), "merges": merges_of(again)}


def resumed(model, folder):
    optimizer = adamw(model)
    weights, moments = get_state_dict(model, optimizer)
    state = {"weights": weights, "moments": moments}
    dcp.load(state, checkpoint_id=folder / "sharded", no_dist=not torch.distributed.is_initialized())
    set_state_dict(model, optimizer, model_state_dict=state["weights"], optim_state_dict=state["moments"])
    return optimizer


def accumulated(rank=None):
    """Two backward passes a step, of which ranks speak in the second alone, and clipping; the model and the norms."""
    model = adapted() if rank is None else by_hand(adapted())
    optimizer, norms = adamw(model), []
    rows = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
    for step in range(4):
        for number in range(2):
            if rank is not None:
                model.set_requires_gradient_sync(number == 1)
            batch = batches()[2 * step + number, rows]
            (model(input_ids=batch, labels=batch).loss / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable(model), 0.01)
        norms.append(float(norm.full_tensor() if rank is not None else norm))
        optimizer.step()
        optimizer.zero_grad()
    return {"state": state_of(model), "merges": merges_of(model), "norms": norms}


def run_fsdp_replicas(rank):
    model = by_hand(adapted(), mesh=init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("replicas", "ranks")))
    train(model, rank)
    return {"state": state_of(model), "merges": merges_of(model)}


def run_fsdp_diagonals(rank):
    model = by_hand(adapted(use_diagonal=True))
    train(model, rank)
    return {"state": state_of(model), "merges": merges_of(model)}


def run_fsdp_mixed(rank):
    with fsdp2_on_cpu(rank):
        chief = accelerator("bf16", cpu_ram_efficient_loading=True)
        model = adapted(torch.bfloat16)
        model, optimizer = chief.prepare(model, adamw(model))
        train(model, rank, optimizer, steps=range(5))
        return {"state": state_of(model), "merges": merges_of(model)}


def run_fsdp_accelerate(rank, folder):
    """The second rank's weights are not read; another model goes on from a state after three steps."""
    with fsdp2_on_cpu(rank):
        chief = accelerator(cpu_ram_efficient_loading=True, state_dict_type="FULL_STATE_DICT")
        model = adapted()
        if rank == 1:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
        model, optimizer = chief.prepare(model, adamw(model))
        train(model, rank, optimizer, steps=range(3))
        chief.save_state(str(folder / "accelerate"))
        again = adapted()
        again, optimizer = (chief := accelerator(state_dict_type="FULL_STATE_DICT")).prepare(again, adamw(again))
        chief.load_state(str(folder / "accelerate"))
        train(again, rank, optimizer, steps=range(3, STEPS))
        return {"state": state_of(again), "merges": merges_of(again)}


def run_fsdp_trainer(rank, folder):
    data = [{"input_ids": row, "labels": row} for row in batches().flatten(0, 1)]

    def trained(**resume):
        forget()
        arguments = TrainingArguments(
            **{"output_dir": str(folder / "trainer"), "per_device_train_batch_size": 2, "max_steps": 5},
            **{"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "steps", "save_steps": 3},
            fsdp=True, fsdp_config={"state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": True},
        )  # fmt: skip
        trainer = Trainer(adapted(), arguments, train_dataset=data)
        trainer.train(**resume)
        return {"state": state_of(trainer.model), "merges": merges_of(trainer.model)}

    with fsdp2_on_cpu(rank):
        return [trained(), trained(resume_from_checkpoint=str(folder / "trainer" / "checkpoint-3"))]


def averaged(rank=None):
    """An average of the weights, made before they are sharded."""
    model = adapted()
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.5))
    if rank is not None:
        by_hand(average.module)
        by_hand(model)
    optimizer = adamw(model)
    for step in range(3):
        train(model, rank, optimizer, steps=[step])
        average.update_parameters(model)
    with torch.no_grad():
        logits = average.module(input_ids=batches()[0]).logits
    parameters = {n: p for n, p in average.module.named_parameters() if p.requires_grad} | {"logits": logits}
    return {name: value.detach() for name, value in whole(parameters).items()}


def tasks(rank, folder):
    return {
        "fsdp resumed": lambda: run_fsdp_resumed(rank, folder),
        "fsdp accelerate": lambda: run_fsdp_accelerate(rank, folder),
        "fsdp accumulated": lambda: accumulated(rank),
        "fsdp replicas": lambda: run_fsdp_replicas(rank),
        "fsdp diagonals": lambda: run_fsdp_diagonals(rank),
        "fsdp mixed": lambda: run_fsdp_mixed(rank),
        "fsdp trainer": lambda: run_fsdp_trainer(rank, folder),
        "fsdp averaged": lambda: averaged(rank),
        "apart": lambda: run_apart(rank),
        "sharded apart": lambda: run_sharded_apart(rank),
        "ddp": lambda: run_ddp(rank),
        "broadcast": lambda: run_broadcast(rank),
        "accumulation": lambda: run_accumulation(rank),
        "other sizes": lambda: run_other_sizes(rank),
        "resumed": lambda: run_resumed(rank),
        "uneven": lambda: run_uneven(rank),
        "nonfinite": lambda: run_nonfinite(rank),
        "fsdp": lambda: run_fsdp(rank, folder),
        "fsdp_nonfinite": lambda: run_fsdp_nonfinite(rank),
        "tensor parallel": lambda: run_tensor_parallel(rank, folder),
    }


# ---------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def ranks(request):
    """The results of both processes, and the folder into which they have saved."""
    folder = once(request, "ranks_of_aslora", lambda folder: run_ranks(__file__, folder))
    return saved_by_ranks(folder), folder


@pytest.fixture(scope="module")
def alone():
    """One process with the joint batch."""
    model = adapted()
    train(model)
    return model


def result(ranks, name):
    return result_of(ranks[0], name)


def test_the_reference_merges_three_times_in_each_projection(alone):
    merges = merges_of(alone)
    assert [step for step, projection, *_ in merges if projection.endswith("q_proj")] == [2, 4, 6]
    assert [step for step, projection, *_ in merges if projection.endswith("down_proj")] == [2, 4, 6]
    assert len(merges) == 6


def test_ddp_ranks_are_bit_equal(ranks):
    first, second = result(ranks, "ddp")
    assert first["merges"] == second["merges"]
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name


def test_ddp_equals_one_process_with_the_joint_batch(ranks, alone):
    first, _ = result(ranks, "ddp")
    assert first["merges"] == merges_of(alone)
    assert_close(first["state"], state_of(alone))


def test_ranks_that_train_apart_do_not_speak_to_each_other(ranks):
    for rank, entry in enumerate(result(ranks, "apart")):
        assert entry["begun"] == 0
        model = adapted()
        optimizer = train(model, rank, steps=range(2)) if rank == 0 else None
        train(model, rank, optimizer, steps=range(2, 4 + rank))
        for name, value in state_of(model).items():
            assert torch.equal(value, entry["state"][name]), name


def test_sharded_parameters_ask_the_ranks_of_their_own_mesh(ranks):
    first, second = result(ranks, "sharded apart")
    assert first["begun"] == second["begun"] == 0
    assert (first["skipped"], second["skipped"]) == (1, 0)


def test_ranks_that_were_sent_the_parameters_compute_and_train_as_the_first(ranks):
    """Also where they find other owners for the rows that share: gradients are collected before the step."""
    model = adapted()
    train(model)
    with torch.no_grad():
        logits = model(input_ids=batches()[0]).logits
    train_on(model)
    first, second = result(ranks, "broadcast")
    assert first["maps"] != second["maps"]  # the second was sent no map
    for entry in (first, second):
        assert torch.equal(entry["logits"], logits)
        assert_close(entry["parameters"], {n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
        for rows, owners in entry["rows"]:
            assert torch.equal(rows, rows[owners])
    for name, value in first["parameters"].items():
        assert torch.equal(value, second["parameters"][name]), name


def test_a_nonfinite_loss_on_one_rank_skips_the_step_on_all(ranks, alone):
    for entry in result(ranks, "nonfinite"):
        assert entry["begun"] == 0
        assert entry["same"]
        assert entry["same_moments"]
        assert entry["skipped"] == 1
        # The run then goes on as if that step had never been: with all its real steps it ends where the others end.
        assert_close(entry["state"], state_of(alone))


def test_accumulation_with_no_sync_and_clipping(ranks):
    model = adapted()
    pairs = zip(batches()[::2], batches()[1::2], strict=True)
    norms = trained_in_parts(model, [[(nullcontext(), one), (nullcontext(), other)] for one, other in pairs])
    assert min(norms) > 0.01  # so that all are clipped
    for entry in result(ranks, "accumulation"):
        assert entry["norms"] == pytest.approx(norms, rel=1e-9)
        assert_close(entry["state"], state_of(model))


def test_ranks_with_batches_of_other_sizes_and_padding_alone(ranks):
    expected = train_on_other_sizes(adapted(), range(WORLD))
    for entry in result(ranks, "other sizes"):
        assert_close(entry["state"], expected)


def test_a_run_goes_on_with_another_number_of_ranks(ranks, alone):
    first, second = result(ranks, "resumed")
    for entry in (first, second, gone_on(first["middle"]), gone_on(second["middle"])):
        assert entry["merges"] == merges_of(alone)
        assert_close(entry["state"], state_of(alone))


def test_ranks_with_other_numbers_of_batches_take_the_merges_of_one_process(ranks):
    """A rank without a batch takes part in no merge, and has all of them when the context ends; then they go on."""
    found = [entry["epochs"] for entry in result(ranks, "uneven")]
    for first, second, (state, merges) in zip(*found, uneven_as_one_process(), strict=True):
        assert first[1] == second[1] == merges
        assert_equal(first[0], second[0])
        assert_close(first[0], state)
    counts = [len(merges) for _, merges in found[0]]
    assert counts[0] < counts[1]  # there are some in each epoch


def test_other_learning_rates_while_merges_are_to_come_are_refused_on_all_ranks(ranks):
    for entry in result(ranks, "uneven"):
        assert re.search(
            r"ranks have learning rates from .* to .*: step the schedule as often on all ranks", entry["error"]
        )


def test_fsdp2_equals_the_unsharded_run(ranks, alone):
    first, second = result(ranks, "fsdp")
    assert first["merges"] == second["merges"] == merges_of(alone)
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name
    assert_close(first["state"], state_of(alone))
    unequal = [name for name in first["shards"] if first["shards"][name] != second["shards"][name]]
    assert unequal  # five rows over two ranks
    assert 0 in second["shards"].values()  # one row over two ranks


@pytest.mark.parametrize("way", ["gathered", "whole"])
def test_fsdp2_saves_what_the_unsharded_run_saves(ranks, alone, tmp_path, way):
    result(ranks, "fsdp")
    alone.save_pretrained(tmp_path / "alone")
    ours, expected = load_file(ranks[1] / way / WEIGHTS), load_file(tmp_path / "alone" / WEIGHTS)
    digest = "base_model.aslora_digest"
    assert_close({k: v for k, v in ours.items() if k != digest}, {k: v for k, v in expected.items() if k != digest})
    # It loads into an unsharded model, which then saves the same bytes again.
    PeftModel.from_pretrained(adapted().unload(), ranks[1] / way).save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[name], ours[name]) for name in ours)


@pytest.mark.parametrize("name", ["fsdp resumed", "fsdp accelerate"])
def test_fsdp2_resumes_between_merges(ranks, name):
    expected = result(ranks, "fsdp")[0]
    for entry in result(ranks, name):
        assert entry["merges"] == expected["merges"]
        training.assert_equal(entry["state"], expected["state"])


def test_one_process_resumes_what_ranks_of_fsdp2_have_saved(ranks, alone):
    result(ranks, "fsdp resumed")
    model = adapted()
    train(model, None, resumed(model, ranks[1]), steps=range(3, STEPS))
    assert merges_of(model) == merges_of(alone)
    assert_close(state_of(model), state_of(alone))


def test_accumulation_and_clipping_under_fsdp2(ranks):
    expected = accumulated()
    assert len(expected["merges"]) == 4
    for entry in result(ranks, "fsdp accumulated"):
        assert entry["merges"] == expected["merges"]
        assert entry["norms"] == pytest.approx(expected["norms"], rel=1e-9)
        assert min(entry["norms"]) > 0.01
        assert_close(entry["state"], expected["state"])


def test_fsdp2_with_replicas_equals_the_unsharded_run(ranks, alone):
    first, second = result(ranks, "fsdp replicas")
    assert first["merges"] == second["merges"] == merges_of(alone)
    training.assert_equal(first["state"], second["state"])
    assert_close(first["state"], state_of(alone))


def test_fsdp2_with_diagonals_equals_the_unsharded_run(ranks):
    first, second = result(ranks, "fsdp diagonals")
    alone = adapted(use_diagonal=True)
    train(alone)
    assert first["merges"] == second["merges"] == merges_of(alone)
    training.assert_equal(first["state"], second["state"])
    assert_close(first["state"], state_of(alone))
    assert any(name.endswith(".diagonal") and value.any() for name, value in first["state"].items())


def test_mixed_precision_under_fsdp2(ranks):
    first, second = result(ranks, "fsdp mixed")
    assert len(first["merges"]) == 4
    assert first["merges"] == second["merges"]
    training.assert_equal(first["state"], second["state"])
    assert {value.dtype for value in first["state"].values() if value.is_floating_point()} == {torch.float32}


def test_a_trainers_run_under_fsdp2_resumes_bit_for_bit(ranks):
    first, second = result(ranks, "fsdp trainer")
    assert {step for step, *_ in first[0]["merges"]} == {2, 4}  # the run was saved between them
    for entry in (*first, *second):
        assert entry["merges"] == first[0]["merges"]
        training.assert_equal(entry["state"], first[0]["state"])


def test_an_average_of_weights_that_fsdp2_shards(ranks):
    first, second = result(ranks, "fsdp averaged")
    training.assert_equal(first, second)
    assert_close(first, averaged())


def test_fsdp2_skips_a_nonfinite_step_on_all_ranks(ranks):
    for entry in result(ranks, "fsdp_nonfinite"):
        assert entry["same"]
        assert entry["skipped"] == 1


def test_models_that_are_sharded_before_the_adapter_comes_are_refused_by_both_methods(ranks):
    for entry in result(ranks, "tensor parallel"):
        assert len(entry) == 4
        for (way, _), error in entry.items():
            expected = "tp_size=2: load it without tp_plan" if way == "tp" else "sharded already.*before fully_shard"
            assert re.search(f"{expected}.*as it was", error), error


if __name__ == "__main__":
    number, results = int(sys.argv[1]), Path(sys.argv[2])
    work_as_rank(number, results, tasks(number, results))
