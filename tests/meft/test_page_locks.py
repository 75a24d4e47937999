"""Rows are page-locked where an engine with CUDA streams reads them, for its device; elsewhere CUDA is not touched."""

import os

import pytest
import torch
from peft import PeftModel

import meft.transport.transfer
from meft import RowAdamW
from meft.transport.streams import CudaStreams
from tests.meft import test_ddp
from tests.support import node_tasks, page_locks
from tests.support.fake_cuda import FakeCuda, forbid_cuda
from tests.support.processes import once, result_of, run_code, run_ranks, saved_by_ranks
from tests.support.tiny_meft import STRATEGIES, Tiny

CPU = torch.device("cpu")


def life(tiny, folder, **fields):
    """Build, train, save, load, decode and evaluate on the CPU."""
    model = tiny.adapted(layers=2, dtype=torch.bfloat16, row_optimizer={"zero_copy": True}, **fields)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = tiny.adamw(model) if fields else RowAdamW(model.parameters())
    for step in range(2):
        scaler.scale(tiny.loss(model, step)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(tiny.trainable(model), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(tiny.base(2, torch.bfloat16), folder).to("cpu").float()
    with torch.inference_mode():
        loaded.generate(input_ids=tiny.batch(1, 3), max_new_tokens=2)
    return model.base_model.transfer_report()


@pytest.mark.parametrize("fields", [{}, {"row_dtype": "float32"}, *({"retrieval": s} for s in STRATEGIES)], ids=str)
def test_a_model_on_the_cpu_touches_no_cuda(tiny, tmp_path, monkeypatch, fields):
    forbid_cuda(monkeypatch)
    assert torch.cuda.is_available()
    assert life(tiny, tmp_path, **fields).refused == ()


def test_the_stand_in_sees_what_asks_for_cuda(tiny, monkeypatch):
    """What the test above would find."""
    forbid_cuda(monkeypatch)
    with pytest.raises(AssertionError, match=r"meft\.transport\.transfer called torch\.cuda\.device"):
        meft.transport.transfer.page_lock(torch.zeros(4), torch.device("cuda", 0))
    with pytest.raises(AssertionError, match="a CUDA context was asked for"):
        torch.cuda.current_device()


CHILD = """
import os, tempfile
import torch
torch.set_num_threads(1)
from tests.support.fake_cuda import forbid_cuda
from tests.support.tiny_meft import Tiny
from pytest import MonkeyPatch
from tests.meft.test_page_locks import life

with tempfile.TemporaryDirectory() as folder:
    life(Tiny(), folder)
    child = os.fork()
    if not child:
        try:
            forbid_cuda(MonkeyPatch())  # in a forked process CUDA cannot be initialised
            life(Tiny(), folder)
            os._exit(7)
        except BaseException as error:
            print(type(error), error, flush=True)
            os._exit(8)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_touches_no_cuda():
    printed = run_code(CHILD)
    assert printed.split()[-1:] == ["7"], printed


# ----------------------------------------------------------------------------------------------- an engine that asks


def on_cuda_streams(model):
    for engine in model.base_model.engines.values():
        engine.use(CudaStreams(CPU))


def compute_copies(tiny, model):
    return [table._compute_copy if table._compute_copy is not None else table.masters for table in tiny.tables(model)]


@pytest.mark.parametrize("row_dtype", ["auto", "float32"], ids=["a narrower copy", "the masters"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_an_engine_reads_is_locked_for_its_device_once(tiny, monkeypatch, strategy, row_dtype):
    cuda = FakeCuda(monkeypatch)
    model = tiny.adapted(layers=2, dtype=torch.bfloat16, retrieval=strategy, row_dtype=row_dtype)
    on_cuda_streams(model)
    assert cuda.locked == []
    tiny.train(model, 2)
    assert sorted(cuda.locked) == sorted((compute_copy.data_ptr(), CPU) for compute_copy in compute_copies(tiny, model))
    assert model.base_model.transfer_report().refused == ()


def test_rows_that_get_other_memory_are_locked_where_an_engine_reads_them_and_not_in_place(tiny, monkeypatch):
    cuda = FakeCuda(monkeypatch)
    model = tiny.adapted(layers=2, dtype=torch.bfloat16)
    on_cuda_streams(model)
    tiny.loss(model).backward()
    first = list(cuda.locked)
    for engine in model.base_model.engines.values():
        engine._given = None  # the model is on the CPU now
    model.half()
    tiny.loss(model).backward()
    assert cuda.locked == first
    on_cuda_streams(model)
    tiny.loss(model).backward()
    assert sorted(cuda.locked[len(first) :]) == sorted(
        (compute_copy.data_ptr(), CPU) for compute_copy in compute_copies(tiny, model)
    )


def test_with_pin_memory_false_nothing_is_locked(tiny, monkeypatch):
    cuda = FakeCuda(monkeypatch)
    model = tiny.adapted(layers=2, dtype=torch.bfloat16, pin_memory=False)
    on_cuda_streams(model)
    tiny.train(model, 1)
    assert cuda.locked == []
    assert model.base_model.transfer_report().refused == ()


def test_the_report_names_what_the_machine_refuses(tiny, monkeypatch):
    FakeCuda(monkeypatch)
    monkeypatch.setattr(meft.transport.transfer, "page_lock", lambda tensor, device: False)
    model = tiny.adapted(dtype=torch.bfloat16, row_optimizer={"zero_copy": True})
    on_cuda_streams(model)
    tiny.loss(model)
    report = model.base_model.transfer_report()
    assert report.refused == ("pin_memory",)
    for table in tiny.tables(model)[:1]:
        table.step.func.refused = True
    report = model.base_model.transfer_report()
    assert report.to_dict()["refused"] == ["pin_memory", "zero_copy"]
    assert "refused by this machine" in str(report)
    assert "pin_memory, zero_copy" in str(report)


# ---------------------------------------------------------------------------------- ranks that share the rows they lock


@pytest.fixture(scope="module")
def ranks(request):
    return saved_by_ranks(once(request, "ranks_of_meft", lambda folder: run_ranks(test_ddp.__file__, folder)))


def locks(places, device, memory):
    return [(address, size, device, memory) for address, size in places]


@pytest.mark.slow
@pytest.mark.parametrize("name", page_locks.NAMES)
def test_each_rank_locks_its_own_view_of_shared_rows_once(ranks, name):
    """A rank whose driver refuses one says so, and trains on as the others do."""
    dtypes, *refused = page_locks.NAMES[name]
    expected, _ = node_tasks.as_one_process(2, dtypes, False)
    for rank, found in enumerate(result_of(ranks, f"locked, {name}")):
        Tiny.assert_equal(found["state"], expected)
        assert found["locked"] == locks(found["places"], torch.device("cuda", rank), "shared")
        kept = [not (refused and rank == page_locks.REFUSED and number == 1) for number in range(3)]
        assert found["pin"] == kept
        assert len(found["said"]) == kept.count(False)
        assert all("could not be page-locked: transfers are slower" in said for said in found["said"])


@pytest.mark.slow
@pytest.mark.parametrize("name", page_locks.NAMES)
def test_locks_end_before_the_memory_does(ranks, name):
    """When a rank goes on with rows of its own, which are locked then; and when a table is gone."""
    for rank, found in enumerate(result_of(ranks, f"locked, {name}")):

        def locked(places, found=found):
            return [place for place, kept in zip(found[places], found["pin"], strict=True) if kept]

        for unlocked, places in (("unlocked", "places"), ("unlocked again", "places again")):
            assert sorted(found[unlocked]) == sorted((address, "shared") for address, _ in locked(places))
        assert found["own"] == locks(locked("own places"), torch.device("cuda", rank), "private")
        assert "shared" not in found["then"]
