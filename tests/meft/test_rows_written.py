"""Whoever writes into rows, in whatever way: the next pass computes with what is there, on every way of the rows."""

import copy
import ctypes
import io
import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel

from meft.table.row_step import update_rows
from meft.table.row_table import RowTable
from meft.transport.streams import HostStreams
from tests.support.thread_streams import ThreadStreams

WAYS = {
    "in place": {},
    "host": {"retrieval": "host"},
    "stream": {"retrieval": "stream"},
    "device-keys": {"retrieval": "device-keys"},
    "device-rows": {"retrieval": "device-rows"},
    "resident": {"placement": "device"},
}
pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")


def make(tiny, dtype, way="in place", **fields):
    model = tiny.adapted(dtype=dtype, **(WAYS[way] | fields)).eval()
    if way != "in place":
        for engine in model.base_model.engines.values():
            engine.use(ThreadStreams())
    return model


@torch.no_grad()
def logits(tiny, model):
    return model(input_ids=tiny.batch()).logits.clone()


def rows(model):
    return [p for name, p in model.named_parameters() if name.endswith(".rows")]


def bare(values):
    return values.detach().clone()


@torch.no_grad()
def by_torch(p):
    p.mul_(-1.5)


@torch.no_grad()
def by_a_view(p):
    p[1:].view(-1)[3:].mul_(-1.5)


@torch.no_grad()
def by_item(p):
    p[p > 0] = 0.25


@torch.no_grad()
def by_set(p):
    p.set_(p.detach() * -1.5)


def by_a_storage(p):
    torch.empty(0, dtype=p.dtype).set_(p.untyped_storage()).mul_(-1.5)


def by_swapping(p):
    torch.utils.swap_tensors(p, nn.Parameter(bare(p) * -1.5))


def by_swapping_out_and_back(p):
    other = nn.Parameter(torch.zeros(p.shape))
    torch.utils.swap_tensors(p, other)
    other.data.mul_(-1.5)
    torch.utils.swap_tensors(p, other)


def by_data_out_and_back(p):
    kept = p.data
    p.data = torch.zeros_like(kept)
    p.data = kept.mul_(-1.5)


def by_a_copy_of_the_parameter(p):
    copy.copy(p).data.mul_(-1.5)


def by_foreach(p):
    torch._foreach_mul_([p.detach()], -1.5)


def by_a_list_of_rows(p):
    for row in p.detach():
        row.numpy()[...] *= -1.5


def by_state_dict(p):
    holder = nn.Module()
    holder.p = p
    holder.state_dict()["p"].numpy()[...] *= -1.5


WRITES = {
    "in place": by_torch,
    "view": by_a_view,
    "masked": by_item,
    "set_": by_set,
    "detach": lambda p: p.detach().mul_(-1.5),
    "detach().data": lambda p: p.detach().data.mul_(-1.5),
    "data.mul_": lambda p: p.data.mul_(-1.5),
    "data.copy_": lambda p: p.data.copy_(bare(p) * -1.5),
    "data = ": lambda p: setattr(p, "data", bare(p) * -1.5),
    "data out and back": by_data_out_and_back,
    "numpy": lambda p: p.detach().numpy().__imul__(-1.5),
    "numpy of a view": lambda p: p.detach()[2].numpy().__imul__(-1.5),
    "asarray": lambda p: np.asarray(p.detach()).__imul__(-1.5),
    "dlpack to numpy": lambda p: np.from_dlpack(p.detach()).__imul__(-1.5),
    "dlpack to torch": lambda p: torch.from_dlpack(p.detach()).mul_(-1.5),
    "storage": by_a_storage,
    "typed storage": lambda p: p.storage().fill_(0.25),
    "as_subclass": lambda p: p.detach().as_subclass(torch.Tensor).data.mul_(-1.5),
    "swap_tensors": by_swapping,
    "swapped out and back": by_swapping_out_and_back,
    "copy.copy": by_a_copy_of_the_parameter,
    "foreach": by_foreach,
    "rows one by one": by_a_list_of_rows,
    "an array of a state dict": by_state_dict,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_a_write_is_seen_by_the_next_pass(tiny, way, dtype):
    model, fresh = make(tiny, dtype, way), make(tiny, dtype, way)
    for name, write in WRITES.items():
        for which in (0, 1):  # keys, values
            before = logits(tiny, model)
            write(rows(model)[which])
            found = logits(tiny, model)
            fresh.load_state_dict(model.state_dict())
            assert not torch.equal(found, before), name
            assert torch.equal(found, logits(tiny, fresh)), name


KEPT = {
    "data": lambda p: p.data,
    "array": lambda p: p.detach().numpy(),
    "memoryview": lambda p: torch.frombuffer(memoryview(p.detach().numpy()), dtype=p.dtype),
    "storage": lambda p: p.untyped_storage(),
    "state dict": lambda p: {"p": p.detach()},
}


def write_kept(held, dtype):
    if isinstance(held, torch.UntypedStorage):
        held = torch.empty(0, dtype=dtype).set_(held)
    if isinstance(held, dict):
        held = held["p"].data
    held *= -1.5


@pytest.mark.parametrize("keep", KEPT.values(), ids=KEPT.keys())
@pytest.mark.parametrize("way", ["in place", "device-rows", "stream"])
def test_what_is_kept_and_written_later_is_seen(tiny, keep, way):
    model, fresh = make(tiny, torch.bfloat16, way), make(tiny, torch.bfloat16, way)
    held = keep(rows(model)[1])
    for _ in range(3):
        before = logits(tiny, model)
        write_kept(held, torch.float32)
        found = logits(tiny, model)
        fresh.load_state_dict(model.state_dict())
        assert not torch.equal(found, before)
        assert torch.equal(found, logits(tiny, fresh))


def test_a_write_by_an_expression_that_ran_a_pass_in_between(tiny):
    """The alias is there before the pass and gone after the write."""
    model = make(tiny, torch.bfloat16)
    parameter = rows(model)[1]
    parameter.data.mul_(logits(tiny, model).max() * 0 - 1.5)
    fresh = make(tiny, torch.bfloat16)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(tiny, model), logits(tiny, fresh))


@pytest.mark.parametrize("way", ["in place", "device-rows"])
def test_parameters_that_are_parts_of_a_vector(tiny, way):
    model, fresh = make(tiny, torch.bfloat16, way), make(tiny, torch.bfloat16, way)
    vector = parameters_to_vector(tiny.trainable(model)).detach() * -1.5
    vector_to_parameters(vector, tiny.trainable(model))
    for _ in range(2):
        found = logits(tiny, model)
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(found, logits(tiny, fresh))
        vector.mul_(-1.5)
    assert not torch.equal(logits(tiny, model), found)


def test_an_averaged_model_computes_with_the_averages(tiny):
    model = make(tiny, torch.bfloat16)
    averaged = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = tiny.adamw(model, lr=0.1)
    for step in range(3):
        tiny.train(model, 1, optimizer, first=step)
        averaged.update_parameters(model)
        logits(tiny, averaged.module.eval())
    fresh = make(tiny, torch.bfloat16)
    fresh.load_state_dict(averaged.module.state_dict())
    assert torch.equal(logits(tiny, averaged.module), logits(tiny, fresh))


def test_an_address_is_written_to_and_said(tiny):
    model = make(tiny, torch.bfloat16)
    parameter = rows(model)[1]
    address = parameter.data_ptr()
    before = logits(tiny, model)
    ctypes.memset(address, 0, parameter.numel() * parameter.element_size())
    model.rows_changed()
    after = logits(tiny, model)
    assert not parameter.any()
    assert not torch.equal(after, before)


# ------------------------------------------------------------------------------------------------------ nothing written


@pytest.fixture
def refreshed(monkeypatch):
    """Tables whose narrow copy was written as a whole."""
    found, refresh = [], RowTable._refresh
    monkeypatch.setattr(RowTable, "_refresh", lambda self, *args: (found.append(self.name), refresh(self, *args))[1])
    return found


def save_state(model, folder):
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model)
    accelerator.save_state(folder)


READS = {
    "save_pretrained": lambda model, folder: model.save_pretrained(folder),
    "state_dict": lambda model, _: model.state_dict() and None,
    "accelerate's save_model": lambda model, folder: Accelerator(cpu=True).save_model(model, folder),
    "accelerate's save_state": save_state,
    "torch.save": lambda model, _: torch.save(model.state_dict(), io.BytesIO()),
    "deepcopy": lambda model, _: copy.deepcopy(model) and None,
    "repr": lambda model, _: repr(rows(model)),
    "sums": lambda model, _: [float(p.detach().norm() + p.sum()) for p in rows(model)],
    "a training state": lambda model, folder: model.base_model.save_training_state(folder),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
@pytest.mark.parametrize("way", ["in place", "device-rows"])
def test_reads_refresh_nothing(tiny, tmp_path, refreshed, read, way):
    model = make(tiny, torch.bfloat16, way)
    tiny.train(model, 2)
    logits(tiny, model)
    moved = [model.base_model.transfer_report().totals()]
    refreshed.clear()
    read(model, str(tmp_path))
    for _ in range(2):
        logits(tiny, model)
        moved.append(model.base_model.transfer_report().totals())
    assert not refreshed
    if way == "device-rows":
        name = "bytes_to_device"
        assert moved[0][name] == moved[1][name] == moved[2][name]


def test_training_refreshes_nothing(tiny, refreshed):
    model = make(tiny, torch.bfloat16)
    optimizer = tiny.train(model, 1)
    assert refreshed  # once, from the values at the beginning
    refreshed.clear()
    tiny.train(model, 3, optimizer)
    assert not refreshed


# ------------------------------------------------------------------------------------------------------ other dtypes


@pytest.mark.parametrize("way", WAYS)
def test_rows_of_a_narrower_dtype_change_what_is_read(tiny, way):
    model = make(tiny, torch.float32, way)
    logits(tiny, model)
    expected = [p.detach().clone() for p in rows(model)]
    for p in rows(model):  # as trl does with what trains over a quantised base
        p.data = p.data.to(torch.bfloat16)
    for p, values in zip(rows(model), expected, strict=True):
        assert p.dtype == torch.float32
        assert torch.equal(p, values.bfloat16().float())
    assert {table.compute_dtype for table in tiny.tables(model)} == {torch.bfloat16}
    fresh = make(tiny, torch.float32, way, row_dtype="bfloat16")
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(tiny, model), logits(tiny, fresh))
    for one in (model, fresh):  # a step far below the precision of bfloat16 is kept
        tiny.train(one, 2, tiny.adamw(one, lr=1e-5))
    tiny.assert_equal(tiny.state(model), tiny.state(fresh))
    assert not torch.equal(rows(model)[1], rows(model)[1].bfloat16().float())


def test_rows_of_one_table_become_narrower(tiny):
    model = make(tiny, torch.float32, "device-rows")
    logits(tiny, model)
    rows(model)[-1].data = rows(model)[-1].data.half()
    found = logits(tiny, model)
    fresh = make(tiny, torch.float32, "device-rows")
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(found, logits(tiny, fresh))


def test_rows_of_a_wider_dtype_are_rounded_and_the_masters_are_read(tiny):
    model = make(tiny, torch.bfloat16)
    logits(tiny, model)
    p = rows(model)[1]
    p.data = torch.full(p.shape, 1 / 3, dtype=torch.float64)
    table = tiny.tables(model)[1]
    assert p.dtype == table.compute_dtype == torch.float32
    with table.reading() as read:
        assert torch.equal(read, torch.full(p.shape, 1 / 3))


def test_a_parameter_of_another_dtype_in_its_place(tiny):
    model = make(tiny, torch.float32)
    table = tiny.tables(model)[1]
    placed = nn.Parameter(table.rows.detach().bfloat16())
    table.rows = placed
    assert table.rows is placed
    assert placed.dtype == torch.float32
    assert table.compute_dtype == torch.bfloat16
    before = logits(tiny, model)
    placed.data.mul_(-1.5)
    assert not torch.equal(logits(tiny, model), before)


@pytest.mark.parametrize(
    "values",
    [torch.zeros(3, 32), torch.zeros(48, 32, dtype=torch.int64), torch.zeros(48, 32, device="meta")],
    ids=["shape", "integers", "meta"],
)
def test_what_cannot_be_rows_is_refused(tiny, values):
    model = make(tiny, torch.float32)
    before = logits(tiny, model)
    with pytest.raises(ValueError, match="MEFT rows"):
        rows(model)[0].data = values
    assert torch.equal(logits(tiny, model), before)


# ------------------------------------------------------------------------------------------------------ as a parameter


def test_rows_are_a_parameter_for_everybody_else(tiny):
    p = rows(make(tiny, torch.float32))[0]
    assert isinstance(p, nn.Parameter)
    assert isinstance(p.detach(), torch.Tensor)
    assert not isinstance(p.detach(), nn.Parameter)
    assert {type(t) for t in (p * 2, p.sum(), p.detach() + p, p.clone(), p.to(torch.float64))} == {torch.Tensor}
    assert type(p[0] * 2) is torch.Tensor
    (p**2).sum().backward()
    assert torch.equal(p.grad.to_dense() if hasattr(p.grad, "row_values") else p.grad, 2 * p.detach())
    assert isinstance(nn.Parameter(p), nn.Parameter)
    assert nn.Parameter(p).data_ptr() == p.data_ptr()


def test_files_hold_plain_tensors(tiny, tmp_path):
    p = rows(make(tiny, torch.float32))[0]
    torch.save({"parameter": p, "tensor": p.detach(), "row": p.detach()[1]}, tmp_path / "rows.pt")
    loaded = torch.load(tmp_path / "rows.pt", weights_only=True)
    assert type(loaded["parameter"]) is nn.Parameter
    assert type(loaded["tensor"]) is type(loaded["row"]) is torch.Tensor
    assert torch.equal(loaded["parameter"], p)
    assert torch.equal(loaded["row"], p[1])


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_sees_its_own_writes(tiny, how):
    model = make(tiny, torch.bfloat16)
    expected = logits(tiny, model)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert torch.equal(logits(tiny, other), expected)
    rows(other)[1].data.mul_(-1.5)
    fresh = make(tiny, torch.bfloat16)
    fresh.load_state_dict(other.state_dict())
    assert torch.equal(logits(tiny, other), logits(tiny, fresh))
    assert not torch.equal(logits(tiny, other), expected)
    assert torch.equal(logits(tiny, model), expected)


@pytest.mark.parametrize(
    "read",
    [
        lambda p: p.detach().clone(),
        lambda p: p.data.clone(),
        lambda p: p + 0,
        lambda p: torch.from_numpy(p.detach().numpy().copy()),
        lambda p: torch.nn.utils.parameters_to_vector([p]).view_as(p),
        lambda p: copy.deepcopy(p),
        lambda p: p[:].clone(),
    ],
)
def test_whoever_reads_after_the_step_waits_for_the_update(tiny, read):
    """Rows of a model on a device are updated by a thread beside the computation."""
    found = []
    for beside in (False, True):
        model = tiny.adapted(1, dtype=torch.float32, retrieval="stream" if beside else "auto")
        if beside:
            model.base_model.engines["default"].use(HostStreams(torch.device("cpu")))
            for table in tiny.tables(model):
                table.step = lambda *args, **settings: (time.sleep(0.2), update_rows(*args, **settings))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        tiny.loss(model).backward()
        before = [table.rows.detach().clone() for table in tiny.tables(model)]
        optimizer.step()
        after = [read(table.rows).detach() for table in tiny.tables(model)]
        assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        found.append(after)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
