"""Rows with a place on the device: a run with them equals, bit for bit, the run without them."""

import copy
import ctypes
import gc
import io
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import meft.retrieval.engine
import meft.tier.residency
import meft.tier.row_tier
from meft import MEFTConfig, RowAdamW
from meft.table.shared_rows import SharedRows
from meft.tier.residency import Residency
from tests.support.thread_streams import on_streams
from tests.support.tiny_meft import STRATEGIES

SHARE = 0.4


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """Rows change their places after every second step."""
    monkeypatch.setattr(meft.tier.residency, "EVERY", 2)


def model_of(tiny, device_rows, dtype=torch.bfloat16, layers=2, **fields):
    torch.manual_seed(0)
    model = tiny.adapted(layers, dtype, device_rows=device_rows, **{"master_dtype": "float32", **fields})
    on_streams(model)
    return model


def run(tiny, model, steps=6, micro=1, clip=0.5, between=lambda *_: None, optimizer=None):
    """Losses, norms and what `between` returns of some steps; then all tensors."""
    optimizer, seen, kept = optimizer or tiny.adamw(model), [], {}
    for step in range(steps):
        optimizer.zero_grad()
        for i in range(micro):
            loss = tiny.loss(model, (micro * step + i) % 5) / micro
            loss.backward()
            seen.append(loss.item())
        if clip:
            seen.append(float(nn.utils.clip_grad_norm_(tiny.trainable(model), clip)))
        optimizer.step()
        if step % 2 and step > 1:
            seen.append(between(model, optimizer, kept))
    return seen, tiny.whole_state(model)


def stepped(model):
    return model.base_model.transfer_report().to_dict()["rows_stepped_on_device"]


def assert_equal_runs(tiny, used=True, **arguments):
    names = ("steps", "micro", "clip", "between", "optimizer")
    given = {name: arguments.pop(name) for name in names if name in arguments}
    make = given.pop("optimizer", None)
    found = []
    for rows in (0, SHARE):
        model = model_of(tiny, rows, **arguments)
        found.append(run(tiny, model, optimizer=make(model) if make else None, **given))
    assert bool(stepped(model)) == used
    assert found[0][0] == found[1][0]
    tiny.assert_equal(found[1][1], found[0][1])
    return model


def test_a_clipped_gradient_is_added_to_zeros(tiny):
    """It is not only taken over: the factor is still to be multiplied by."""
    found = []
    for rows in (0, SHARE):
        model = model_of(tiny, rows)
        optimizer = tiny.adamw(model)
        for step in range(5):
            tiny.loss(model, step).backward()
            nn.utils.clip_grad_norm_(tiny.trainable(model), 1e-3)
            for table in tiny.tables(model):
                total = table.rows.grad.new_empty_strided(table.rows.shape, table.rows.stride())
                table.rows.grad = total.add_(table.rows.grad)
            optimizer.step()
            optimizer.zero_grad()
        found.append(tiny.whole_state(model))
    assert stepped(model)
    tiny.assert_equal(*found)


# ---------------------------------------------------------------------- who has a place


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), places=st.integers(0, 30), most=st.integers(1, 12))
def test_there_are_never_more_rows_than_places(seed, places, most):
    random = torch.Generator().manual_seed(seed)
    residency, resident = Residency(2, 15), torch.zeros(30, dtype=torch.bool)
    for _ in range(9):
        allowed = (torch.rand(2, generator=random) < 0.8).repeat_interleave(15)
        resident &= allowed  # their layers were settled
        for layer in range(2):
            residency.note(layer, torch.randint(15, (4,), generator=random))
        residency.end_step(places, resident, allowed)
        moves = residency.moves(places, resident, allowed, most)
        assert resident[moves.leave].all()
        assert not resident[moves.enter].any()
        assert allowed[moves.enter].all()
        assert len(moves.enter) <= most
        assert len(moves.leave) <= len(moves.enter)
        resident[moves.leave], resident[moves.enter] = False, True
        assert resident.sum() <= places


def test_what_is_used_often_stays_and_what_was_used_last_does_not_displace_it():
    residency, resident = Residency(1, 10), torch.zeros(10, dtype=torch.bool)
    allowed = torch.ones(10, dtype=torch.bool)
    for step in range(9):
        residency.note(0, torch.tensor([3, 7, step]))  # two that are hot, and one that never comes again
        residency.end_step(2, resident, allowed)
        moves = residency.moves(2, resident, allowed, 10)
        resident[moves.leave], resident[moves.enter] = False, True
    assert resident.nonzero().flatten().tolist() == [3, 7]


# ---------------------------------------------------------------------- equal bits


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("rows", "micro"), [("save", 3), ("refetch", 1)])
def test_a_run_equals_that_without(tiny, strategy, rows, micro):
    assert_equal_runs(tiny, micro=micro, retrieval=strategy, backward_rows=rows)


WAYS = {
    "in backward": {"clip": 0, "row_optimizer": {"in_backward": True}},
    "steps by the device": {"row_optimizer": {"zero_copy": True}},
    "float8": {"row_optimizer": {"moments": "float8"}},
    "bfloat16 masters": {"row_optimizer": {"moments": "rowwise"}, "master_dtype": "bfloat16"},
    "float32 gradients": {"gradient_dtype": "float32", "clip": 0},
    "float32": {"dtype": torch.float32},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_equals_that_without_whatever_the_way(tiny, way):
    assert_equal_runs(tiny, retrieval="stream", **WAYS[way])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_run_equals_that_without_where_layers_are_computed_again(tiny, reentrant):
    found = []
    for rows in (0, SHARE):
        model = model_of(tiny, rows, retrieval="stream", backward_rows="refetch")
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model.train()
        found.append(run(tiny, model, micro=2))
    assert stepped(model)
    assert found[0][0] == found[1][0]
    tiny.assert_equal(found[1][1], found[0][1])


def test_a_run_of_row_adamw_equals_that_without(tiny):
    assert_equal_runs(tiny, retrieval="stream", optimizer=lambda model: RowAdamW(tiny.trainable(model), lr=1e-2))


# ---------------------------------------------------------------------- steps of some of the tables


def batch_of(step):
    return step % 5 if step < 4 else 20 + step


def losses_and_state(tiny, model, steps, before_step=lambda *_: None):
    """Each step uses other rows, so that those of before leave; only what `before_step` returns is stepped."""
    optimizer, losses = tiny.adamw(model), []
    for step in range(steps):
        optimizer.zero_grad()
        loss = tiny.loss(model, batch_of(step))
        loss.backward()
        before_step(step, model, optimizer)
        optimizer.step()
        losses.append(loss.item())
    return losses, tiny.whole_state(model)


def assert_equal_with(tiny, before_step, steps=12, **fields):
    models = [model_of(tiny, rows, retrieval="stream", **fields) for rows in (0, SHARE)]
    (expected, plain), (found, tiered) = (losses_and_state(tiny, model, steps, before_step) for model in models)
    assert stepped(models[1])
    assert found == expected
    tiny.assert_equal(tiered, plain)


@pytest.mark.parametrize("in_backward", [False, True])
def test_rows_of_a_layer_that_is_not_stepped_any_more_leave_with_their_values(tiny, in_backward):
    def freeze(step, model, optimizer):
        for table in tables_of(model)[:2] if step == 3 else ():
            table.rows.requires_grad_(False)

    assert_equal_with(tiny, freeze, row_optimizer={"in_backward": in_backward})


def test_moments_of_one_of_a_layers_tables_may_be_dropped(tiny):
    def drop(step, model, optimizer):
        for table in tables_of(model)[1::2] if step in (5, 7) else ():
            optimizer.state.pop(table.rows)

    assert_equal_with(tiny, drop, steps=9)


def test_gradients_that_are_added_to_after_a_step_are_those_of_before_to_the_step(tiny):
    def add_behind_it(step, model, optimizer):
        tables, first = tables_of(model), {}
        for table in tables:
            first[table], table.rows.grad = table.rows.grad, None
        tiny.loss(model, batch_of(step)).backward()
        second = {table: table.rows.grad for table in tables}
        for table in tables:
            table.rows.grad = first.pop(table)
            table.wait_for_update()
        added = threading.Event()
        tables[0].updates.add(lambda: added.wait(0.2), "an update before those of the step")
        optimizer.step()
        for table in tables:
            table.rows.grad.add_(second[table])
        added.set()
        for parameter in tiny.trainable(model):  # the others are not stepped again
            parameter.grad = None

    assert_equal_with(tiny, add_behind_it, steps=6)


# ---------------------------------------------------------------------- what others read and write


def tables_of(model):
    return [t for layer in model.base_model.engines["default"].layers for t in (layer.keys, layer.values)]


def writes_data(model, optimizer, kept):
    for table in tables_of(model):
        table.rows.data.mul_(1.5)


def writes_a_kept_array(model, optimizer, kept):
    arrays = kept.setdefault("arrays", [table.rows.detach().numpy() for table in tables_of(model)])
    for table in tables_of(model):
        table.synchronize()
    for array in arrays:
        array[2:7] += 0.01
    return [float(array.sum()) for array in arrays]


def writes_a_kept_view(model, optimizer, kept):
    views = kept.setdefault("views", [table.rows.detach()[5:20] for table in tables_of(model)])
    with torch.no_grad():
        for view in views:
            view.add_(0.01)


def writes_to_an_address(model, optimizer, kept):
    for table in tables_of(model):
        (ctypes.c_float * 8).from_address(table.rows.data_ptr())[0] = 0.25
    model.base_model.rows_changed()


def assigns(model, optimizer, kept):
    for table in tables_of(model):
        table.rows.data = table.rows.detach() * 1.1


def loads(model, optimizer, kept):
    model.load_state_dict({n: v * 0.9 for n, v in model.state_dict().items() if ".meft_" in n}, strict=False)


def averages(model, optimizer, kept):
    averaged = kept.setdefault("averaged", AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)))
    averaged.update_parameters(model)
    return [float(p.double().sum()) for p in averaged.parameters()]


def saves(model, optimizer, kept):
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    optimizer.load_state_dict(state)
    return [float(v.double().sum()) for n, v in weights.items() if ".meft_" in n]


def goes_back(model, optimizer, kept):
    if "state" in kept:
        model.load_state_dict(kept["weights"], strict=False)
        optimizer.load_state_dict(kept["state"])
    else:
        kept["state"] = copy.deepcopy(optimizer.state_dict())
        kept["weights"] = {n: v.clone() for n, v in model.state_dict().items() if ".meft_" in n}


def writes_kept_moments(model, optimizer, kept):
    entries = [optimizer.state[table.rows]["row_moments"] for table in tables_of(model)]
    if len(kept) == 0:
        kept["moments"] = [entry.moments.exp_avg for entry in entries]
        kept["view"] = [entry.moments.exp_avg_sq[2:] for entry in entries]
    for table in tables_of(model):
        table.wait_for_update()
    for tensor in (*kept["moments"], *kept["view"]):
        tensor.mul_(0.5)
    return [float(tensor.sum()) for tensor in kept["moments"]]


def halves_gradients(model, optimizer, kept):
    """As a step of its own, by gradients that are on the host."""
    for table in tables_of(model):
        gradient = table.rows.grad
        table.rows.grad = gradient * 0.5
        if kept:
            table.rows.grad.row_values.mul_(0.5)
    kept["later"] = True
    optimizer.step()


def steps_again(model, optimizer, kept):
    optimizer.step()


OTHERS = [
    *(writes_data, writes_a_kept_array, writes_a_kept_view, writes_to_an_address, assigns, loads, averages, saves),
    *(writes_kept_moments, goes_back, halves_gradients, steps_again),
]


@pytest.mark.parametrize("others", OTHERS, ids=lambda function: function.__name__)
def test_what_others_read_and_write_is_the_newest(tiny, others):
    assert_equal_runs(tiny, steps=8, clip=0, between=others, retrieval="device-keys")


def test_a_copy_of_the_model_has_the_newest_rows(tiny):
    model = model_of(tiny, SHARE, retrieval="stream")
    run(tiny, model)
    tiny.assert_equal(tiny.state(copy.deepcopy(model)), tiny.state(model))


def test_rows_that_were_written_behind_its_back_are_an_error(tiny):
    model = model_of(tiny, SHARE, retrieval="stream")
    optimizer = tiny.train(model, 3)
    with pytest.raises(RuntimeError, match=r"synchronize\(\) of the table before you write"):
        model.base_model.rows_changed()
    for table in tables_of(model):
        table.synchronize()
    model.base_model.rows_changed()
    tiny.train(model, 1, optimizer)


def test_rows_that_are_swapped_for_others_are_an_error_or_complete(tiny):
    model = model_of(tiny, 1.0, retrieval="host")
    plain = model_of(tiny, 0, retrieval="host")
    for each in (model, plain):
        optimizer = tiny.adamw(each)
        for step in range(4):
            tiny.loss(each, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        tiny.loss(each)  # all updates are done
    others = [nn.Parameter(torch.ones_like(table.rows)) for table in tables_of(model)]
    for table, other in zip(tables_of(model), others, strict=True):
        torch.utils.swap_tensors(table.rows, other)
    tiny.loss(model)
    for table, other in zip(tables_of(plain), others, strict=True):
        assert torch.equal(other.detach(), table.rows.detach())


# ---------------------------------------------------------------------- faults that caches of rows are known for


def test_rows_in_use_may_leave(tiny, monkeypatch):
    """Rows of a pass are gathered; before it is computed all of them leave, and others get their places."""
    gather, found, left = meft.retrieval.engine.Engine.gather, [], []

    def gather_and_leave(pending):
        rows, tier = gather(pending), pending.layer.tier
        if tier is not None and tier.residents is not None and step == 5:
            left.append(len(tier.residents.rows))
            tier.settle()
            for pool in tier.owner.pools:
                for tensor in pool.state.tensors():
                    tensor.fill_(77)
        return rows

    monkeypatch.setattr(meft.retrieval.engine.Engine, "gather", staticmethod(gather_and_leave))
    for share in (0, SHARE):
        model, losses = model_of(tiny, share, retrieval="host", layers=1), []
        optimizer = tiny.adamw(model)
        for step in range(7):
            optimizer.zero_grad()
            loss = tiny.loss(model, step)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        found.append((losses, tiny.whole_state(model)))
    assert sum(left) > 0
    assert found[0][0] == found[1][0]
    tiny.assert_equal(found[1][1], found[0][1])


def test_passes_without_a_backward_pass_hold_nothing(tiny):
    model = model_of(tiny, SHARE, retrieval="stream")
    optimizer = tiny.adamw(model)
    for step in range(6):
        with torch.no_grad():
            tiny.loss(model, 40 + step)
        tiny.loss(model, 50 + step)  # its graph is dropped
        hook = tiny.layers(model)[1].base_layer.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tiny.loss(model, 60 + step)
        hook.remove()
        gc.collect()
        optimizer.zero_grad()
        tiny.loss(model, step).backward()
        optimizer.step()
    (tier,) = model.base_model.engines["default"].tiers
    tier.release()
    assert not any(each.holds_rows for each in tier.tiers)
    plain = model_of(tiny, 0, retrieval="stream")
    optimizer = tiny.adamw(plain)
    for step in range(6):
        optimizer.zero_grad()
        tiny.loss(plain, step).backward()
        optimizer.step()
    tiny.assert_equal(tiny.whole_state(model), tiny.whole_state(plain))


def test_rows_that_enter_take_bounded_memory(tiny, monkeypatch):
    monkeypatch.setattr(meft.tier.row_tier, "MOST_ENTERING", 0)  # one row a layer
    model = model_of(tiny, SHARE, retrieval="stream")
    optimizer, entered = tiny.adamw(model), []
    for step in range(6):
        optimizer.zero_grad()
        tiny.loss(model, step).backward()
        optimizer.step()
        entered.append(model.base_model.transfer_report().to_dict()["rows_entered"])
    assert [b - a for a, b in zip([0, *entered], entered, strict=False)] == [2] * 6


def test_rows_that_come_home_are_copied_alone(tiny, monkeypatch):
    """Neither the narrower copy of the whole table is made anew, nor does it cross."""
    model, refreshed, crossed = model_of(tiny, SHARE, retrieval="device-rows"), [], []
    monkeypatch.setattr(meft.tier.residency, "EVERY", 1)
    optimizer, refresh = tiny.adamw(model), SharedRows._refresh
    tiny.train(model, 3, optimizer)
    monkeypatch.setattr(SharedRows, "_refresh", lambda *args: refreshed.append(args[0]) or refresh(*args))
    for step in range(3, 9):
        before = model.base_model.transfer_report().to_dict()["bytes_to_device"]
        tiny.train(model, 1, optimizer, first=step)
        crossed.append(model.base_model.transfer_report().to_dict()["bytes_to_device"] - before)
    assert model.base_model.transfer_report().to_dict()["rows_entered"] > 40
    assert not set(refreshed) & set(tables_of(model))  # another test's model may be refreshed yet
    assert max(crossed) < 4 * tiny.R * tiny.WIDTH * 2  # four tables


# ---------------------------------------------------------------------- how many places


def places_of(model):
    return [tier.places for tier in model.base_model.engines["default"].tiers]


def test_a_size_and_a_share_are_what_is_asked_for(tiny):
    for asked, expected in ((0.25, 24), ("0.00001GiB", None), (1, 96)):
        model = model_of(tiny, asked, retrieval="stream")
        assert places_of(model) == []
        tiny.train(model, 1)
        row = 2 * (tiny.WIDTH * (4 + 4 + 4 + 2 + 4) + 4)  # master, moments, what is read, a gradient; the count
        assert places_of(model) == [expected if expected is not None else int(0.00001 * 2**30) // row]
    pools = model.base_model.engines["default"].tiers[0].pools
    assert sum(t.nbytes for pool in pools for t in pool.state.tensors()) == 96 * (row - 2 * 4 * tiny.WIDTH)


def test_auto_takes_what_the_first_step_leaves_and_gives_way(tiny, monkeypatch):
    free = 30_000
    model = model_of(tiny, "auto", retrieval="stream")
    engine = model.base_model.engines["default"]
    engine.room = lambda device: free
    run(tiny, model, steps=3)
    (first,) = places_of(model)
    assert first == 30_000 // 1160
    tiny.loss(model, length=20)  # a pass of more tokens than the step that the places were made after
    assert places_of(model) == [0]
    free = 5_000 - first * 1160  # and what it has left, with the places that were there at its peak
    tiny.train(model, 1, length=20)
    assert places_of(model) == [5_000 // 1160]
    free = 1_000
    monkeypatch.setattr(meft.retrieval.engine, "out_of_memory_errors", lambda device: 1)
    tiny.train(model, 1)
    assert places_of(model) == [5_000 // 1160 // 2]


def test_places_that_do_not_fit_are_fewer(tiny, monkeypatch):
    zeros, asked, errors = torch.zeros, [], []
    monkeypatch.setattr(meft.retrieval.engine, "out_of_memory_errors", lambda device: len(errors))

    def limited(shape, *args, **fields):
        if isinstance(fields.get("device"), torch.device) and isinstance(shape, tuple) and tiny.WIDTH in shape[1:]:
            asked.append(shape[0])
            if shape[0] > 10:
                errors.append(None)
                raise torch.OutOfMemoryError("no")
        return zeros(shape, *args, **fields)

    model = model_of(tiny, 0.5, retrieval="stream")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", limited)
        tiny.train(model, 1)
    assert places_of(model) == [6]
    run(tiny, model)
    assert places_of(model) == [6]  # the errors are not taken for those of a pass


def test_no_row_of_a_model_that_reads_in_place_gets_a_place(tiny):
    model = tiny.adapted(device_rows=0.5)
    tiny.train(model, 3)
    assert model.base_model.engines["default"].tiers == []


def test_layers_on_several_devices_are_refused_every_time(tiny):
    engine = model_of(tiny, SHARE, retrieval="stream").base_model.engines["default"]
    devices = [torch.device("cuda", number) for number in range(2)]
    engine.devices, engine.reads_in_place = lambda: devices, lambda device: False
    for layer, device in zip(engine.layers * 2, devices * 2, strict=True):
        with pytest.raises(RuntimeError, match=r"several devices: set device_rows=0"):
            engine.at(layer, device)


def test_asking_autograd_for_gradients_takes_no_rows_back(tiny):
    model = model_of(tiny, SHARE, retrieval="stream")
    optimizer = tiny.train(model, 4)
    loss, parameters = tiny.loss(model), [table.rows for table in tables_of(model)]
    (tier,) = model.base_model.engines["default"].tiers
    assert any(each.residents is not None for each in tier.tiers)
    before = [each.residents for each in tier.tiers]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    assert [each.residents for each in tier.tiers] == before
    optimizer.step()


@pytest.mark.parametrize("asked", [-0.1, 1.5, "8 GB", "all", True])
def test_what_is_no_number_of_places_is_refused(asked):
    with pytest.raises(ValueError, match=r"device_rows=.* must be a number from 0 to 1, a size such as '8GiB', or"):
        MEFTConfig(device_rows=asked)
    with pytest.raises(ValueError, match="placement='host'"):
        MEFTConfig(device_rows=0.5, placement="device")
    assert MEFTConfig(device_rows="0.5GiB").device_rows == "0.5GiB"


def test_a_report_tells_of_it(tiny):
    model = model_of(tiny, SHARE, retrieval="stream")
    plain = model_of(tiny, 0, retrieval="stream")
    for each in (model, plain):
        run(tiny, each)
    report, other = (each.base_model.transfer_report() for each in (model, plain))
    assert 0 < report.hot_share < 1
    assert report.to_dict()["bytes_saved"] > 0 == other.to_dict()["bytes_saved"]
    assert "did not cross because of it" in str(report)
    assert "did not cross" not in str(other)
