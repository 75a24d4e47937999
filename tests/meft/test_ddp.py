"""Two gloo processes: DDP equals one process with the joint batch, and the ranks equal each other; FSDP1 is refused.

The processes run this file as a script, once for all tests (`python test_ddp.py RANK FOLDER`).
"""

import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import meft
from tests.support import node_tasks, page_locks, uneven_tasks
from tests.support.processes import once, result_of, run_ranks, saved_by_ranks, work_as_rank
from tests.support.thread_streams import ThreadStreams
from tests.support.tiny_meft import Tiny
from tests.support.training import assert_close

pytestmark = pytest.mark.slow  # two processes, for all of them
WORLD, STEPS, ROWS, LENGTH = 2, 5, 2, 6
ENGINES = {
    "stream refetch": {"retrieval": "stream", "backward_rows": "refetch"},
    "device-rows save": {"retrieval": "device-rows", "backward_rows": "save"},
}


def adapted(seed=0, delay=None, **fields):
    """Args: delay: longest, in seconds, of the copies by fake streams; None: rows are in place."""
    model = Tiny.adapted(2, torch.float64, seed=seed, **fields)
    if delay is not None:
        model.base_model.engines["default"].use(ThreadStreams(seed, delay))
    return model


def with_rows_of_its_own(rank, **fields):
    """The same base on all ranks, adapters of other seeds."""
    model = adapted(seed=rank, **fields)
    base = {k: v for k, v in adapted().get_base_model().state_dict().items() if ".meft_" not in k}
    model.get_base_model().load_state_dict(base, strict=False)
    assert rank == 0 or not torch.equal(Tiny.tables(model)[0].rows, Tiny.tables(adapted())[0].rows)
    return model


def joint(step):
    return Tiny.batch(WORLD * ROWS, LENGTH, seed=50 + step)


def mine(step, rank):
    return joint(step)[ROWS * rank : ROWS * rank + ROWS]


def clipped(model):
    return torch.nn.utils.clip_grad_norm_(Tiny.trainable(model), 0.05)


def train(model, rank=None, optimizer=None, steps=range(STEPS), clip=False):
    """Rank None sees the joint batch."""
    optimizer = optimizer or Tiny.adamw(model)
    norms = []
    for step in steps:
        batch = joint(step) if rank is None else mine(step, rank)
        model(input_ids=batch, labels=batch).loss.backward()
        if clip:
            norms.append(float(clipped(model)))
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, norms


# ---------------------------------------------------------------------- what the two processes do


def run_ddp(rank, clip=False, **fields):
    model = with_rows_of_its_own(rank, **fields)  # DDP brings the first rank's weights to all, and the rows come too
    wrapped = DistributedDataParallel(model)
    names = {n for b in [wrapped.parameters_to_ignore] for n in b}
    in_buckets = {name for name, p in wrapped.module.named_parameters() if p.requires_grad and name not in names}
    optimizer, norms = train(wrapped, rank, clip=clip)
    assert optimizer.state
    return {"state": Tiny.whole_state(model), "buckets": in_buckets, "ignored": names, "norms": norms}


def run_checkpointed(rank, reentrant, **fields):
    model = adapted(**fields).train()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    train(DistributedDataParallel(model), rank)
    return {"state": Tiny.whole_state(model)}


def accumulate(model, backward, clip=False):
    """Two backward passes a step, the first without synchronising; returns the norms."""
    optimizer, norms = Tiny.adamw(model), []
    for step in range(3):
        backward(2 * step, False)
        backward(2 * step + 1, True)
        if clip:
            norms.append(float(clipped(model)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def run_accumulation(rank, clip=False, **fields):
    model = adapted(**fields)
    wrapped = DistributedDataParallel(model)

    def backward(number, synchronise):
        batch = mine(number, rank)
        with nullcontext() if synchronise else wrapped.no_sync():
            (wrapped(input_ids=batch, labels=batch).loss / 2).backward()

    norms = accumulate(model, backward, clip)
    return {"state": Tiny.whole_state(model), "norms": norms}


def run_in_backward(rank, in_backward):
    """Returns also whether rows moved before the optimizer's step."""
    rule = {"in_backward": in_backward}
    model = adapted(delay=2e-3, retrieval="stream", row_optimizer=rule)
    wrapped, optimizer, early = DistributedDataParallel(model), Tiny.adamw(model), []
    for step in range(STEPS):
        batch = mine(step, rank)
        loss = wrapped(input_ids=batch, labels=batch).loss
        before = [table.version for table in Tiny.tables(model)]
        loss.backward()
        early.append([table.version for table in Tiny.tables(model)] != before)
        clipped(model)
        optimizer.step()
        optimizer.zero_grad()
    assert all(table.updates is not None for table in Tiny.tables(model))
    return {"state": Tiny.whole_state(model), "early": early}


def train_beside(wrapped, model, batches):
    """A backward pass through a pass of the wrapper and one beside it, which DDP averages alike."""
    optimizer = Tiny.adamw(model)
    for batch in batches:
        loss = wrapped(input_ids=batch, labels=batch).loss
        (loss + 1e-2 * model(input_ids=batch).logits.square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"state": Tiny.whole_state(model)}


def run_beside(rank):
    model = adapted()
    return train_beside(DistributedDataParallel(model), model, [mine(step, rank) for step in range(3)])


def run_lengths(rank, **fields):
    """Ranks with batches of other sizes; the second one's is padding alone in one step."""
    model = adapted(**fields)
    wrapped = DistributedDataParallel(model)
    optimizer = Tiny.adamw(model)
    for step in range(3):
        batch = Tiny.batch(1 + rank, 5 + 3 * rank, seed=step)
        mask = torch.ones_like(batch)
        if rank and step == 1:
            mask.zero_()
        wrapped(input_ids=batch, attention_mask=mask).logits.nan_to_num().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"state": Tiny.whole_state(model)}


def run_evaluation_first(rank, **fields):
    """The rows of rank 0 also count in an evaluation before the first training step."""
    model = with_rows_of_its_own(rank, **fields)
    with torch.no_grad():
        model(input_ids=joint(0))  # with its own rows, of which the engine may hold copies
        return {"logits": DistributedDataParallel(model)(input_ids=joint(0)).logits}


def collectives():
    """Number of collectives that this rank has begun on the default group."""
    return torch.distributed.group.WORLD._get_sequence_number_for_group()


def run_apart(rank, **fields):
    """No DDP: rank 0 trains while rank 1 is elsewhere, then both with batches of their own and numbers of their own."""
    before = collectives()
    model = adapted(**fields)
    optimizer = train(model, rank, steps=range(2))[0] if rank == 0 else None
    train(model, rank, optimizer, steps=range(2, 4 + rank))
    return {"begun": collectives() - before, "state": Tiny.whole_state(model)}


def run_nonfinite(rank, **fields):
    model = adapted(**fields)
    wrapped = DistributedDataParallel(model)
    optimizer, _ = train(wrapped, rank, steps=range(2))
    before = Tiny.whole_state(model)
    batch = mine(2, rank)
    loss = wrapped(input_ids=batch, labels=batch).loss
    (loss * (float("nan") if rank == 1 else 1)).backward()
    begun = collectives()
    optimizer.step()
    begun = collectives() - begun
    optimizer.zero_grad()
    after = Tiny.whole_state(model)
    same = all(torch.equal(after[name], before[name]) for name in before)
    skipped = model.base_model.nonfinite_steps
    train(wrapped, rank, optimizer, steps=range(2, STEPS))
    return {"same": same, "skipped": skipped, "begun": begun, "state": Tiny.whole_state(model)}


def chosen(model, rank=None):
    """Two tasks, of which only the most used rows are trained; each step has a pass without synchronising."""
    wrapped = model if rank is None else DistributedDataParallel(model)
    logits, norms = {}, []
    for name in ("a", "b"):
        optimizer = Tiny.adamw(model, lr=5e-2)
        for step in range(2):
            for part in range(2):
                number = 4 * (name == "b") + 2 * step + part
                batch = joint(number) if rank is None else mine(number, rank)
                with nullcontext() if part or rank is None else wrapped.no_sync():
                    (wrapped(input_ids=batch, labels=batch).loss / 2).backward()
            norms.append(float(clipped(model)))
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            logits[name] = model(input_ids=joint(0)).logits
        meft.freeze_rows(model, name)
    for name in ("b", "a", None):
        meft.select_task(model, name)
        with torch.no_grad():
            assert torch.equal(model(input_ids=joint(0)).logits, logits[name or "b"])
    batch = joint(9) if rank is None else mine(9, rank)
    wrapped(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    return {"state": Tiny.whole_state(model), "norms": norms, "logits": logits}


def run_joined_chosen(rank):
    wrapped = DistributedDataParallel(adapted(train_rows={"top": 6}))

    def run():
        with wrapped.join():
            pass

    return refusal(run)


def run_chosen(rank, **fields):
    return chosen(adapted(init_weights=True, train_rows={"top": 6}, **fields), rank)


def refusal(run):
    try:
        run()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": "none"}


def run_fsdp1(rank, use_orig_params):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = adapted()
    for parameter in model.parameters():
        parameter.requires_grad = True

    def run():
        device = torch.device("cpu")
        train(FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=device), rank, steps=range(1))

    return refusal(run)


TASKS = {
    "apart": run_apart,
    "apart in backward": lambda rank: run_apart(
        rank, delay=2e-3, retrieval="stream", row_optimizer={"in_backward": True}
    ),
    "ddp": run_ddp,
    "clipping": lambda rank: run_ddp(rank, clip=True),
    "checkpointed": lambda rank: run_checkpointed(rank, False),
    "checkpointed reentrant": lambda rank: run_checkpointed(rank, True),
    "accumulation": run_accumulation,
    "beside": run_beside,
    "chosen": run_chosen,
    "joined, chosen": run_joined_chosen,
    "chosen, delayed": lambda rank: run_chosen(rank, delay=2e-3, retrieval="host"),
    "lengths": run_lengths,
    "evaluation first": run_evaluation_first,
    "nonfinite": run_nonfinite,
    "in backward": lambda rank: run_in_backward(rank, True),
    "within the step": lambda rank: run_in_backward(rank, False),
    "fsdp1": lambda rank: run_fsdp1(rank, False),
    "fsdp1 original": lambda rank: run_fsdp1(rank, True),
}

for _name, _fields in ENGINES.items():
    _fields = {"delay": 2e-3, **_fields}
    TASKS |= {
        f"ddp, {_name}": partial(run_ddp, clip=True, **_fields),
        f"accumulation, {_name}": partial(run_accumulation, clip=True, **_fields),
        f"lengths, {_name}": partial(run_lengths, **_fields),
        f"evaluation first, {_name}": partial(run_evaluation_first, **_fields),
        f"nonfinite, {_name}": partial(run_nonfinite, **_fields),
        f"checkpointed, {_name}": partial(run_checkpointed, reentrant=False, **_fields),
        f"checkpointed reentrant, {_name}": partial(run_checkpointed, reentrant=True, **_fields),
    }

# Done a second time with a copy of the rows for each rank, for `test_node.py`.
APART = ["clipping", "accumulation, stream refetch", "lengths", "evaluation first", "nonfinite"]
APART += [f"{name}, delayed" for name in node_tasks.READERS]


# ---------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def ranks(request):
    """The results of both processes."""
    return saved_by_ranks(once(request, "ranks_of_meft", lambda folder: run_ranks(__file__, folder)))


def assert_bit_equal(ranks, name):
    first, second = result_of(ranks, name)
    Tiny.assert_equal(first["state"], second["state"])
    assert any(".counts" in key for key in first["state"])
    return first


@pytest.fixture(scope="module")
def alone():
    """Task -> one process with the joint batch."""

    def whole(**fields):
        clip = fields.pop("clip", False)
        model = adapted(**fields)
        _, norms = train(model, clip=clip)
        return Tiny.whole_state(model), norms

    return whole


def test_tables_are_not_in_ddps_buckets(ranks):
    for entry in result_of(ranks, "ddp"):
        assert len(entry["ignored"]) == 4
        assert all(name.endswith(".rows") for name in entry["ignored"])
        assert len(entry["buckets"]) == 2
        assert all("meft_router" in name for name in entry["buckets"])


def test_the_rows_of_the_first_rank_count_and_both_end_equal(ranks, alone):
    """The ranks' models were made from other seeds."""
    assert_close(assert_bit_equal(ranks, "ddp")["state"], alone()[0])


def test_a_choice_of_rows_is_refused_inside_of_join(ranks):
    for entry in result_of(ranks, "joined, chosen"):
        assert "are not supported inside of DistributedDataParallel.join(): give all ranks" in entry["error"]


@pytest.mark.parametrize(("name", "fields"), {"chosen": {}, "chosen, delayed": {"retrieval": "host"}}.items())
def test_the_ranks_choose_the_rows_of_the_joint_batch(ranks, name, fields):
    expected = chosen(adapted(init_weights=True, train_rows={"top": 6}, **fields))
    for entry in result_of(ranks, name):
        assert entry["norms"] == pytest.approx(expected["norms"], rel=1e-9)
    assert_close(assert_bit_equal(ranks, name)["state"], expected["state"])


@pytest.mark.parametrize("name", ["clipping", *(f"ddp, {name}" for name in ENGINES)])
def test_clipping_counts_the_same_norm_as_one_process(ranks, alone, name):
    expected, norms = alone(clip=True)
    for entry in result_of(ranks, name):
        assert entry["norms"] == pytest.approx(norms, rel=1e-9)
        assert min(entry["norms"]) > 0.05
    assert_close(assert_bit_equal(ranks, name)["state"], expected)


def each(name):
    """A task with rows in place, and by the engine."""
    return [name, *(f"{name}, {engine}" for engine in ENGINES)]


@pytest.mark.parametrize("name", [*each("checkpointed"), *each("checkpointed reentrant")])
def test_gradient_checkpointing(ranks, alone, name):
    assert_close(assert_bit_equal(ranks, name)["state"], alone()[0])


@pytest.mark.parametrize("name", each("accumulation"))
def test_accumulation_with_no_sync(ranks, name):
    clip = "," in name
    model = adapted()

    def backward(number, synchronise):
        (model(input_ids=joint(number), labels=joint(number)).loss / 2).backward()

    norms = accumulate(model, backward, clip)
    for entry in result_of(ranks, name):
        assert entry["norms"] == pytest.approx(norms, rel=1e-9)
    assert all(norm > 0.05 for norm in norms)
    assert_close(assert_bit_equal(ranks, name)["state"], Tiny.whole_state(model))


@pytest.mark.parametrize("name", each("lengths"))
def test_ranks_with_other_lengths_and_padding_alone(ranks, name):
    assert_close(assert_bit_equal(ranks, name)["state"], result_of(ranks, "lengths")[0]["state"])


def test_a_pass_beside_the_wrapper_is_averaged_with_its_own(ranks):
    model = adapted()
    whole = train_beside(model, model, [joint(step) for step in range(3)])
    assert_close(assert_bit_equal(ranks, "beside")["state"], whole["state"])


@pytest.mark.parametrize("name", each("evaluation first"))
def test_an_evaluation_before_the_first_step_sees_the_first_ranks_rows(ranks, name):
    with torch.no_grad():
        expected = adapted()(input_ids=joint(0)).logits
    for entry in result_of(ranks, name):
        torch.testing.assert_close(entry["logits"], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["apart", "apart in backward"])
def test_ranks_that_train_apart_do_not_speak_to_each_other(ranks, name):
    for rank, entry in enumerate(result_of(ranks, name)):
        assert entry["begun"] == 0
        model = adapted(delay=None if name == "apart" else 0.0, retrieval="stream" if name != "apart" else "auto")
        optimizer = train(model, rank, steps=range(2))[0] if rank == 0 else None
        train(model, rank, optimizer, steps=range(2, 4 + rank))
        Tiny.assert_equal(entry["state"], Tiny.whole_state(model))


@pytest.mark.parametrize("name", each("nonfinite"))
def test_a_nonfinite_loss_on_one_rank_skips_the_step_on_all(ranks, alone, name):
    for entry in result_of(ranks, name):
        assert entry["begun"] == 0
        assert entry["same"]
        assert entry["skipped"] == 1
    assert_close(assert_bit_equal(ranks, name)["state"], alone()[0])


def test_updates_in_the_backward_pass_wait_for_the_step(ranks, alone):
    """Only then are the ranks' gradients averaged; they may be clipped, too."""
    for entry in result_of(ranks, "in backward"):
        assert not any(entry["early"])
    state = assert_bit_equal(ranks, "in backward")["state"]
    Tiny.assert_equal(state, assert_bit_equal(ranks, "within the step")["state"])
    assert_close(state, alone(clip=True)[0])


@pytest.mark.parametrize("name", ["fsdp1", "fsdp1 original"])
def test_fsdp1_is_refused(ranks, name):
    for entry in result_of(ranks, name):
        assert "FSDP" in entry["error"], entry["error"]
        assert "not supported" in entry["error"]
        assert "DistributedDataParallel" in entry["error"]


def test_deepspeed_is_refused_when_a_trainers_run_begins():
    from types import SimpleNamespace

    from peft_bridge.training.trainer_runs import RunEvents

    model = adapted()
    optimizer = type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})()
    state = SimpleNamespace(max_steps=3, global_step=0)
    with pytest.raises(RuntimeError, match=r"do not follow this engine.*DistributedDataParallel"):
        RunEvents().on_train_begin(None, state, None, model=model, optimizer=optimizer)
    RunEvents().on_train_begin(None, state, None, model=model, optimizer=Tiny.adamw(model))


if __name__ == "__main__":
    number, place = int(sys.argv[1]), Path(sys.argv[2])
    tasks = {name: partial(task, number) for name, task in TASKS.items()}
    tasks |= node_tasks.tasks(number, place) | page_locks.tasks(number) | uneven_tasks.tasks(number)
    tasks |= {f"apart, {name}": partial(node_tasks.apart, tasks[name]) for name in APART}
    work_as_rank(number, place, tasks)
