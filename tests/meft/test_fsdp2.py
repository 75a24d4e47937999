"""Two gloo processes: FSDP2 by hand, by accelerate and by a Trainer equals one process with the joint batch.

The processes run this file as a script, once for all tests (`python test_fsdp2.py RANK FOLDER`).
"""

import copy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import PeftModel, get_peft_model
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from transformers import Trainer, TrainingArguments

import meft
from peft_bridge.accelerate_private import clip_over_devices
from tests.support import node_tasks
from tests.support.fsdp2 import accelerator, by_hand, forget, fsdp2_on_cpu, same_everywhere, whole
from tests.support.processes import once, result_of, run_ranks, saved_by_ranks, work_as_rank
from tests.support.thread_streams import ThreadStreams
from tests.support.tiny_meft import Tiny
from tests.support.training import assert_close

pytestmark = pytest.mark.slow  # two processes, for all of them
LENGTH, CLIP, STEPS = 6, 0.05, 3
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def adapted(rows_of=0, **fields):
    """Args: rows_of: a rank; others than the first have rows that must not count."""
    model = Tiny.adapted(2, torch.float64, **fields)
    if rows_of:
        with torch.no_grad():
            for table in Tiny.tables(model):
                table.rows.add_(1)
    return model


def joint(step):
    return Tiny.batch(4, LENGTH, seed=50 + step)


def batch_of(step, rank):
    """Rank None sees the joint batch."""
    return joint(step) if rank is None else joint(step)[2 * rank : 2 * rank + 2]


def norm_of(norm):
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def clipped(model):
    return norm_of(torch.nn.utils.clip_grad_norm_(Tiny.trainable(model), CLIP))


def train(model, rank=None, optimizer=None, steps=range(STEPS), clip=clipped):
    """The optimizer, and the norms of the gradients."""
    optimizer, norms = optimizer or Tiny.adamw(model), []
    for step in steps:
        batch = batch_of(step, rank)
        model(input_ids=batch, labels=batch).loss.backward()
        norms.append(clip(model))
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, norms


def state_of(model):
    return whole(Tiny.whole_state(model))


def result(model, **more):
    state = state_of(model)
    return {"state": state, "equal": same_everywhere(state), **more}


# ---------------------------------------------------------------------- what the two processes do


def run_by_hand(rank, layers=True, clip=clipped, **fields):
    model = by_hand(adapted(rank, **fields), layers)
    _, norms = train(model, rank, clip=clip)
    node = model.base_model.ranks.node
    return result(model, norms=norms, sharded=[isinstance(p, DTensor) for p in Tiny.trainable(model)],
                  shared=node is not None and all(table.is_shared for table in Tiny.tables(model)))  # fmt: skip


def accumulate(model, rank=None, wait=lambda synchronise: None):
    """Two backward passes a step; in the second step the second rank's loss is nan at first."""
    optimizer, norms = Tiny.adamw(model), []
    for step in range(3):
        for bad in [True, False] if step == 1 and rank is not None else [False]:
            for number in range(2):
                wait(number == 1)
                batch = batch_of(2 * step + number, rank)
                loss = model(input_ids=batch, labels=batch).loss / 2
                (loss * (float("nan") if bad and rank == 1 else 1)).backward()
            norms.append(clipped(model))
            optimizer.step()
            optimizer.zero_grad()
    return norms


def run_accumulated(rank, waits):
    """Args: waits: whether ranks speak in a step's last backward pass alone."""
    model = by_hand(adapted(rank))
    norms = accumulate(model, rank, model.set_requires_gradient_sync if waits else lambda synchronise: None)
    return result(model, norms=norms, skipped=model.base_model.nonfinite_steps)


def run_engine(rank, **fields):
    """Rows that are brought again for a recomputation."""
    model = adapted(rank, retrieval="stream", backward_rows="refetch", **fields)
    model.base_model.engines["default"].use(ThreadStreams(rank, 2e-3))
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    by_hand(model.train())
    _, norms = train(model, rank)
    return result(model, norms=norms)


def run_lengths(rank):
    """Ranks with batches of other sizes, the second one's padding alone in one step; as under DDP."""

    def trained(model, wrapped):
        optimizer = Tiny.adamw(model)
        for step in range(3):
            batch = Tiny.batch(1 + rank, 5 + 3 * rank, seed=step)
            mask = torch.full_like(batch, not (rank and step == 1))
            wrapped(input_ids=batch, attention_mask=mask).logits.nan_to_num().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model

    one, other = adapted(rank), adapted(rank)
    return result(trained(by_hand(one), one), ddp=state_of(trained(other, DistributedDataParallel(other))))


def run_row_adamw(rank):
    """Rows in an optimizer of their own; base and routers are kept in host memory between passes."""
    model = by_hand(adapted(rank), offload_policy=CPUOffloadPolicy(pin_memory=False))
    rows = [table.rows for table in Tiny.tables(model)]
    others = [parameter for parameter in Tiny.trainable(model) if isinstance(parameter, DTensor)]
    pair = meft.RowAdamW(rows, lr=1e-2, weight_decay=0.1), torch.optim.AdamW(others, lr=1e-2, weight_decay=0.1)
    norms = []
    for step in range(STEPS):
        batch = batch_of(step, rank)
        model(input_ids=batch, labels=batch).loss.backward()
        norms.append(clipped(model))
        for optimizer in pair:
            optimizer.step()
            optimizer.zero_grad()
    return result(model, norms=norms)


def run_scaled(rank):
    """GradScaler; the second rank's loss overflows once."""
    model = by_hand(adapted(rank))
    optimizer, scaler = Tiny.adamw(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(STEPS):
        for bad in [True, False] if step == 1 else [False]:
            batch = batch_of(step, rank)
            loss = model(input_ids=batch, labels=batch).loss
            scaler.scale(loss * (float("inf") if bad and rank == 1 else 1)).backward()
            scaler.unscale_(optimizer)
            clipped(model)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return result(model, skipped=model.base_model.nonfinite_steps, scale=scaler.get_scale())


def run_meshes(rank, *shape):
    mesh = DeviceMesh("cpu", torch.arange(2).view(shape), mesh_dim_names=("replicas", "ranks"))
    model = by_hand(adapted(rank), mesh=mesh)
    train(model, rank)
    return result(model)


def run_apart(rank):
    """Each rank is a mesh of its own."""
    begun = torch.distributed.group.WORLD._get_sequence_number_for_group
    model = by_hand(adapted(), mesh=DeviceMesh("cpu", [[rank]], mesh_dim_names=("replicas", "ranks")))
    before = begun()
    train(model, rank, steps=range(1 + rank))
    return {"state": state_of(model), "begun": begun() - before}


def run_saved(rank, folder):
    """After two steps: a sharded state, a full one, and an adapter that all ranks gather; then two steps more."""
    model = by_hand(adapted())
    optimizer, _ = train(model, rank, steps=range(2))
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"weights": weights, "moments": moments}, checkpoint_id=folder / "sharded")
    full = get_model_state_dict(model, options=FULL), get_optimizer_state_dict(model, optimizer, options=FULL)
    if rank == 0:
        torch.save(full, folder / "full.pt")
    model.save_pretrained(folder / "adapter", is_main_process=rank == 0)
    torch.distributed.barrier()
    train(model, rank, optimizer, steps=range(2, 4))
    return result(model, left=[len(each) for each in full])


def run_resumed(rank, folder, kind):
    model = by_hand(adapted(rows_of=1))
    optimizer = Tiny.adamw(model)
    if kind == "sharded":
        weights, moments = get_state_dict(model, optimizer)
        state = {"weights": weights, "moments": moments}
        dcp.load(state, checkpoint_id=folder / "sharded")
        set_state_dict(model, optimizer, model_state_dict=state["weights"], optim_state_dict=state["moments"])
    else:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        full = torch.load(folder / f"{kind}.pt", weights_only=True) if rank == 0 else ({}, {})
        set_model_state_dict(model, full[0], options=options)
        set_optimizer_state_dict(model, optimizer, full[1], options=options)
    train(model, rank, optimizer, steps=range(2, 4))
    return result(model)


def run_from_one_process(rank, folder):
    if rank == 0:
        model = adapted()
        optimizer, _ = train(model, steps=range(2))
        torch.save(get_state_dict(model, optimizer, options=FULL), folder / "alone.pt")
    torch.distributed.barrier()
    return run_resumed(rank, folder, "alone")


def run_accelerator(rank, folder, kind):
    """Accumulation and clipping by accelerate; the second rank's weights are not read."""
    with fsdp2_on_cpu(rank):
        chief = accelerator(accumulation=2, cpu_ram_efficient_loading=True, state_dict_type=kind)
        model = adapted()
        if rank == 1:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
        memory = [(table.rows, table.masters.data_ptr()) for table in Tiny.tables(model)]
        model, optimizer = chief.prepare(model, Tiny.adamw(model))
        tables = Tiny.tables(model)
        kept = all(t.rows is rows and t.masters.data_ptr() == at for t, (rows, at) in zip(tables, memory, strict=True))

        def steps(model, optimizer, chief, steps):
            norms = []
            for step in steps:
                for number in range(2):
                    batch = batch_of(2 * step + number, rank)
                    with chief.accumulate(model):
                        chief.backward(model(input_ids=batch, labels=batch).loss)
                        if chief.sync_gradients:
                            norms.append(norm_of(chief.clip_grad_norm_(model.parameters(), CLIP)))
                        optimizer.step()
                        optimizer.zero_grad()
            return norms

        norms = steps(model, optimizer, chief, range(2))
        chief.save_state(str(folder / kind))
        norms += steps(model, optimizer, chief, range(2, 3))
        chief = accelerator(accumulation=2, state_dict_type=kind)
        other = adapted(rows_of=1)
        other, optimizer = chief.prepare(other, Tiny.adamw(other))
        chief.load_state(str(folder / kind))
        steps(other, optimizer, chief, range(2, 3))
        return result(model, norms=norms, kept=kept, resumed=state_of(other))


def run_mixed(rank, ram):
    """Masters in bfloat16, which accelerate casts to float32 where it finds them."""
    with fsdp2_on_cpu(rank):
        chief = accelerator("bf16", cpu_ram_efficient_loading=ram)
        model = Tiny.adapted(2, torch.float32, seed=0, master_dtype="bfloat16")
        model, optimizer = chief.prepare(model, Tiny.adamw(model))
        for step in range(2):
            batch = batch_of(step, rank)
            chief.backward(model(input_ids=batch, labels=batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        return result(model, dtypes=[table.masters.dtype for table in Tiny.tables(model)])


def run_trainer(rank, folder, kind):
    data = [{"input_ids": row, "labels": row} for step in range(6) for row in joint(step)]

    def trained(model, **resume):
        forget()
        arguments = TrainingArguments(
            **{"output_dir": str(folder / f"trainer {kind}"), "per_device_train_batch_size": 2, "max_grad_norm": CLIP},
            **{"gradient_accumulation_steps": 2, "learning_rate": 1e-2, "weight_decay": 0.1, "use_cpu": True},
            **{"report_to": "none", "disable_tqdm": True, "save_strategy": "steps", "save_steps": 2, "max_steps": 3},
            fsdp=True, fsdp_config={"state_dict_type": kind, "cpu_ram_efficient_loading": True},
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.train(**resume)
        return trainer

    with fsdp2_on_cpu(rank):
        trainer = trained(adapted(rank))
        again = trained(adapted(1), resume_from_checkpoint=str(folder / f"trainer {kind}" / "checkpoint-2"))
        trainer.save_model(str(folder / f"trained {kind}"))
        return result(trainer.model, resumed=state_of(again.model), fsdp=str(trainer.accelerator.distributed_type))


def run_averaged(rank):
    """An average of the weights is made before they are sharded."""
    model = adapted(rank)
    averaged = AveragedModel(model, avg_fn=get_ema_avg_fn(0.5))
    by_hand(averaged.module)
    by_hand(model)
    optimizer, states = Tiny.adamw(model), []
    for step in range(2):
        train(model, rank, optimizer, steps=[step])
        averaged.update_parameters(model)
        states.append(whole(Tiny.state(model)))
    with torch.no_grad():
        logits = averaged.module(input_ids=joint(9)).logits
    return {"states": states, "average": whole(Tiny.state(averaged.module)), "logits": logits,
            "copied": refusal(lambda: copy.deepcopy(model))}  # fmt: skip


def refusal(run):
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def run_refused(rank):
    sharded, partly, summed, base = by_hand(adapted()), adapted(), by_hand(adapted()), Tiny.base()
    fully_shard(partly.get_base_model().model.layers[0])
    summed.get_base_model().model.layers[1].set_gradient_divide_factor(1.0)
    fully_shard(base)
    return {
        "late": refusal(lambda: sharded.add_adapter("late", Tiny.config())),
        "sharded": refusal(lambda: get_peft_model(base, Tiny.config())),
        "partly": refusal(lambda: train(partly, rank)),
        "summed": refusal(lambda: train(summed, rank)),
    }


def tasks(rank, folder):
    found = {
        "layers": partial(run_by_hand, rank),
        "root": partial(run_by_hand, rank, layers=False),
        "chosen": partial(run_by_hand, rank, train_rows={"top": 6}),
        "over devices": partial(run_by_hand, rank, clip=lambda m: norm_of(clip_over_devices(Tiny.trainable(m), CLIP))),
        "engine": partial(run_engine, rank),
        "lengths": partial(run_lengths, rank),
        "RowAdamW": partial(run_row_adamw, rank),
        "scaled": partial(run_scaled, rank),
        "accumulated": partial(run_accumulated, rank, True),
        "averaged each time": partial(run_accumulated, rank, False),
        "replicas": partial(run_meshes, rank, 2, 1),
        "one replica": partial(run_meshes, rank, 1, 2),
        "apart": partial(run_apart, rank),
        "saved": partial(run_saved, rank, folder),
        "sharded, resumed": partial(run_resumed, rank, folder, "sharded"),
        "full, resumed": partial(run_resumed, rank, folder, "full"),
        "from one process": partial(run_from_one_process, rank, folder),
        "accelerate, full": partial(run_accelerator, rank, folder, "FULL_STATE_DICT"),
        "accelerate, sharded": partial(run_accelerator, rank, folder, "SHARDED_STATE_DICT"),
        "mixed": partial(run_mixed, rank, False),
        "mixed, efficient": partial(run_mixed, rank, True),
        "trainer, full": partial(run_trainer, rank, folder, "FULL_STATE_DICT"),
        "trainer, sharded": partial(run_trainer, rank, folder, "SHARDED_STATE_DICT"),
        "averaged": partial(run_averaged, rank),
        "refused": partial(run_refused, rank),
    }
    return found | {f"apart, {name}": partial(node_tasks.apart, found[name]) for name in ("layers", "accumulated")}


# ---------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def ranks(request):
    """The results of both processes, and the folder into which they have saved."""
    folder = once(request, "ranks_of_meft_fsdp2", lambda folder: run_ranks(__file__, folder))
    return saved_by_ranks(folder), folder


@pytest.fixture(scope="module")
def alone():
    """One process with the joint batch."""
    model = adapted()
    _, norms = train(model)
    return Tiny.whole_state(model), norms


@pytest.fixture(scope="module")
def accumulated():
    """One process that accumulates over two joint batches."""
    model = adapted()
    norms = accumulate(model)
    return Tiny.whole_state(model), norms


@pytest.fixture(scope="module")
def four_steps():
    model = adapted()
    train(model, steps=range(4))
    return Tiny.whole_state(model)


def of_both(ranks, name):
    """What the first rank has, once both have the same."""
    first, second = result_of(ranks[0], name)
    assert first["equal"]
    assert second["equal"]
    return first


@pytest.mark.parametrize("name", ["layers", "root", "over devices", "apart, layers"])
def test_by_hand_with_the_rows_of_the_first_rank(ranks, alone, name):
    found = of_both(ranks, name)
    assert found["sharded"] == 2 * [False, False, True]  # keys, values and router of each layer
    assert found["shared"] is not name.startswith("apart")
    assert found["norms"] == pytest.approx(alone[1], rel=1e-9)
    assert min(found["norms"]) > CLIP
    assert_close(found["state"], alone[0])


def test_the_ranks_choose_the_rows_of_the_joint_batch(ranks):
    model, found = adapted(train_rows={"top": 6}), of_both(ranks, "chosen")
    _, norms = train(model)
    assert found["norms"] == pytest.approx(norms, rel=1e-9)
    assert_close(found["state"], Tiny.whole_state(model))


@pytest.mark.parametrize("name", ["engine", "RowAdamW"])
def test_other_ways_of_rows(ranks, alone, name):
    found = of_both(ranks, name)
    assert found["norms"] == pytest.approx(alone[1], rel=1e-9)
    assert_close(found["state"], alone[0])


def test_ranks_with_other_lengths_and_padding_alone(ranks):
    found = of_both(ranks, "lengths")
    assert_close(found["state"], found["ddp"])


@pytest.mark.parametrize("name", ["accumulated", "averaged each time", "apart, accumulated"])
def test_accumulation_clipping_and_a_skipped_step(ranks, accumulated, name):
    found = of_both(ranks, name)
    finite = [norm for norm in found["norms"] if norm == norm]
    assert finite == pytest.approx(accumulated[1], rel=1e-9)
    assert found["skipped"] == len(found["norms"]) - len(finite) == 1
    assert_close(found["state"], accumulated[0])


def test_a_grad_scaler_skips_the_step_of_all_ranks(ranks, alone):
    found = of_both(ranks, "scaled")
    assert found["skipped"] == 1
    assert found["scale"] == 512.0
    assert_close(found["state"], alone[0])


@pytest.mark.parametrize("name", ["replicas", "one replica"])
def test_rows_are_averaged_over_both_dimensions_of_a_mesh(ranks, alone, name):
    assert_close(of_both(ranks, name)["state"], alone[0])


def test_ranks_with_meshes_of_their_own_do_not_speak_to_each_other(ranks):
    for rank, found in enumerate(result_of(ranks[0], "apart")):
        assert found["begun"] == 0
        model = adapted()
        train(model, rank, steps=range(1 + rank))
        assert_close(found["state"], Tiny.whole_state(model))


@pytest.mark.parametrize("name", ["sharded, resumed", "full, resumed"])
def test_resumed_from_a_saved_state(ranks, four_steps, name):
    expected = of_both(ranks, "saved")["state"]
    Tiny.assert_equal(of_both(ranks, name)["state"], expected)
    assert_close(expected, four_steps)


def test_a_full_state_is_the_first_ranks_alone(ranks):
    first, second = result_of(ranks[0], "saved")
    assert min(first["left"]) > 0
    assert second["left"] == [0, 0]


def test_resumed_with_another_number_of_ranks(ranks, four_steps):
    assert_close(of_both(ranks, "from one process")["state"], four_steps)
    model = adapted(rows_of=1)
    optimizer = Tiny.adamw(model)
    weights, moments = get_state_dict(model, optimizer)
    state = {"weights": weights, "moments": moments}
    dcp.load(state, checkpoint_id=ranks[1] / "sharded", no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=state["weights"], optim_state_dict=state["moments"])
    train(model, None, optimizer, steps=range(2, 4))
    assert_close(Tiny.whole_state(model), four_steps)


def test_an_adapter_that_the_ranks_gather_loads_anywhere(ranks):
    model = adapted()
    train(model, steps=range(2))
    loaded = PeftModel.from_pretrained(Tiny.base(), ranks[1] / "adapter")
    assert_close(Tiny.state(loaded), Tiny.state(model))


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_accelerate(ranks, accumulated, kind):
    found = of_both(ranks, f"accelerate, {kind}")
    assert found["kept"]  # no copy, and the optimizer has the same parameters
    assert found["norms"] == pytest.approx(accumulated[1], rel=1e-9)
    assert_close(found["state"], accumulated[0])
    Tiny.assert_equal(found["resumed"], found["state"])


@pytest.mark.parametrize("name", ["mixed", "mixed, efficient"])
def test_mixed_precision_leaves_masters_as_they_are(ranks, name):
    assert set(of_both(ranks, name)["dtypes"]) == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_a_trainers_run_resumes_bit_for_bit(ranks, kind):
    found = of_both(ranks, f"trainer, {kind}")
    assert found["fsdp"] == "DistributedType.FSDP"
    Tiny.assert_equal(found["resumed"], found["state"])
    Tiny.assert_equal(found["state"], of_both(ranks, "trainer, full")["state"])


def test_a_trainer_saves_the_adapter(ranks):
    loaded = PeftModel.from_pretrained(Tiny.base(), ranks[1] / "trained FULL_STATE_DICT")
    state = of_both(ranks, "trainer, full")["state"]
    Tiny.assert_equal(Tiny.state(loaded), {name: state[name] for name in Tiny.state(loaded)})


def test_an_average_of_the_weights(ranks):
    first, second = result_of(ranks[0], "averaged")
    one, two = first["states"]
    for name, value in first["average"].items():
        torch.testing.assert_close(value, (one[name] + two[name]) / 2, rtol=1e-12, atol=1e-14)
    assert torch.equal(first["logits"], second["logits"])
    assert "FSDP does not support deepcopy" in first["copied"]


def test_the_step_by_which_torch_makes_an_optimizers_state_moves_no_row():
    """Also where rows have a rate of their own, which torch does not set to 0."""
    model = adapted(row_optimizer={"lr": 0.1, "weight_decay": 0.5})
    before = Tiny.state(model)
    state = get_optimizer_state_dict(model, Tiny.adamw(model))["state"]
    assert all("exp_avg" not in entry for name, entry in state.items() if name.endswith(".rows"))
    Tiny.assert_equal(Tiny.state(model), before)
    assert Tiny.most_touches(model) == 4 * [0]


def test_what_cannot_be_right_is_refused(ranks):
    for found in result_of(ranks[0], "refused"):
        for name in ("late", "sharded"):
            assert "base model is sharded already" in found[name]
        assert "call it with one mesh for all layers" in found["partly"]
        assert "set_gradient_divide_factor" in found["summed"]


if __name__ == "__main__":
    number, place = int(sys.argv[1]), Path(sys.argv[2])
    work_as_rank(number, place, tasks(number, place))
