"""Rows on the device (`device_rows`) where something goes wrong, or another thread reads and writes: none is lost."""

import functools
import io
import itertools
import threading
import time
from contextlib import contextmanager

import numpy
import pytest
import torch
from torch import nn

import meft.table.row_step
import meft.tier.layer_places
import meft.tier.layer_tier
import meft.tier.residency
import meft.tier.residents
import meft.tier.row_pool
import meft.tier.row_tier
from meft.retrieval.engine import Engine
from meft.table.row_table import RowTable
from meft.tier.layer_places import LayerPlaces
from meft.tier.layer_tier import LayerTier
from meft.tier.row_tier import RowTier
from peft_bridge.torch_private import without_torch_function
from tests.support.thread_streams import ThreadStreams

SHARE = 0.4


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """Rows change their places after every step."""
    monkeypatch.setattr(meft.tier.residency, "EVERY", 1)


def model_of(tiny, device_rows=SHARE, layers=1, streams=None, **fields):
    torch.manual_seed(0)
    fields = {"master_dtype": "float32", "retrieval": "host"} | fields
    model = tiny.adapted(layers, torch.bfloat16, device_rows=device_rows, **fields)
    model.base_model.engines["default"].use(streams or ThreadStreams())
    return model


def tables_of(model):
    return [t for layer in model.base_model.engines["default"].layers for t in (layer.keys, layer.values)]


def tier_of(model):
    (tier,) = model.base_model.engines["default"].tiers
    return tier


def step(tiny, model, optimizer, number, clip=0.5):
    optimizer.zero_grad()
    loss = tiny.loss(model, number)
    loss.backward()
    if clip:
        nn.utils.clip_grad_norm_(tiny.trainable(model), clip)
    optimizer.step()
    return loss.item()


def run(tiny, model, steps=6, **fields):
    optimizer = tiny.adamw(model)
    losses = [step(tiny, model, optimizer, number, **fields) for number in range(steps)]
    return losses, tiny.whole_state(model)


# ---------------------------------------------------------------------- other threads


@contextmanager
def interrupted(place, work):
    """At the first call of a method, another thread does some work, which it begins before the call, and another after.

    Where it takes rows back, steps go on before it reads or writes them.
    """
    (owner, name), threads, errors, main = place, [], [], threading.get_ident()
    real, settle, has_settled = getattr(owner, name), LayerPlaces.settle, threading.Event()

    def beside():
        """Give it the time for what it does first, unless it has to wait."""
        has_settled.clear()
        threads.append(threading.Thread(target=attempt))
        threads[-1].start()
        has_settled.wait(0.03)

    def attempt():
        try:
            work()
        except BaseException as error:  # the test raises it
            errors.append(error)

    @functools.wraps(real)
    def called(*args, **kwargs):
        if threads:
            return real(*args, **kwargs)
        beside()
        result = real(*args, **kwargs)
        beside()
        return result

    def settle_and_rest(tier):
        settle(tier)
        if threading.get_ident() != main:
            has_settled.set()
            time.sleep(0.04)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerPlaces, "settle", settle_and_rest)
        patch.setattr(owner, name, called)
        yield threads
    if errors:
        raise errors[0]


PLACES = [
    (LayerTier, "step"), (LayerTier, "_step"), (LayerTier, "placement"), (LayerTier, "read"), (LayerTier, "divide"),
    (LayerTier, "fill"), (LayerPlaces, "land"), (LayerPlaces, "leave"), (LayerPlaces, "enter"),
    (LayerPlaces, "_change"), (LayerPlaces, "queue_changes"), (RowTier, "_end_step"), (RowTable, "update_later"),
]  # fmt: skip
IN_STEPS = ("step", "_step", "land", "leave", "enter", "queue_changes", "_end_step")


def saved(model, optimizer):
    torch.save((model.state_dict(), optimizer.state_dict()), io.BytesIO())


def interrupted_steps(tiny, model, optimizer, places, work):
    """Every third step is interrupted in another place, so that rows are on the device."""
    threads, losses = [], []
    for number in range(3 * len(places)):
        if number % 3 == 2:
            with interrupted(places[number // 3], work) as begun:
                losses.append(step(tiny, model, optimizer, number))
            threads += begun
        else:
            losses.append(step(tiny, model, optimizer, number))
        if number % 3 == 0:
            for thread in threads:
                thread.join()
    assert len(threads) >= len(places)
    return losses


@pytest.mark.parametrize(("strategy", "rows"), [("stream", "refetch"), ("device-rows", "save")])
def test_saving_in_another_thread_while_steps_run_loses_nothing(tiny, strategy, rows):
    fields = {"retrieval": strategy, "backward_rows": rows}
    expected = run(tiny, model_of(tiny, 0, **fields), steps=3 * len(PLACES))
    model = model_of(tiny, **fields)
    optimizer, table = tiny.adamw(model), tables_of(model)[1]

    def save():
        table.synchronize()
        torch.save((table.rows, optimizer.state[table.rows]), io.BytesIO())

    losses = interrupted_steps(tiny, model, optimizer, PLACES, save)
    assert losses == expected[0]
    tiny.assert_equal(tiny.whole_state(model), expected[1])


def test_what_another_thread_writes_while_steps_run_stays(tiny):
    """The steps change moments alone (lr 0): what is written must be there afterwards, all of it."""
    model, written = model_of(tiny), []
    optimizer = torch.optim.AdamW(tiny.trainable(model), lr=0, weight_decay=0)
    table, writing = tables_of(model)[1], threading.Lock()
    step(tiny, model, optimizer, 0)
    before = table.rows.detach().clone()

    def write():
        with writing, torch.no_grad():
            table.rows.add_(0.5)
            written.append(None)

    interrupted_steps(tiny, model, optimizer, [place for place in PLACES if place[1] in IN_STEPS], write)
    for _ in written:
        before.add_(0.5)
    assert torch.equal(table.rows.detach(), before)


# ---------------------------------------------------------------------- faults


class Oracle:
    """What each row of a model's tables was last stepped to, wherever that was."""

    def __init__(self, tiny, model, patch):
        self.tiny, self.model, self.errors = tiny, model, []
        self.state = {}
        self.real = meft.table.row_step.update_rows
        self.layers = model.base_model.engines["default"].layers
        for table in tables_of(model):
            table.step = functools.partial(self.on_host, table)
        patch.setattr(LayerTier, "_step_some", self.on_device(LayerTier._step_some))
        patch.setattr(Engine, "_arrived", self.read(Engine._arrived))

    def note(self, table, rows, state, places):
        held = self.of(table)
        for name, tensor in state._asdict().items():
            if tensor is not None and name != "compute_copy":
                held[name][rows] = tensor[places]

    def of(self, table):
        """Its tensors; with moments, fresh ones, from its first step on."""
        held = self.state.setdefault(table, {})
        if not held:
            held["table"] = table.masters.clone()
        if len(held) == 1 and table.entry is not None:
            held |= table.entry.held.clone().tensors()
        return held

    def on_host(self, table, state, rows, grads, rule, **fields):
        self.of(table)
        self.real(state, rows, grads, rule, **fields)
        self.note(table, rows, state, rows)

    def on_device(self, real):
        def step(tier, table, residents, numbers, *args):
            self.of(table)
            real(tier, table, residents, numbers, *args)
            rows = residents.rows[numbers.long()]
            self.note(table, rows, tier.owner.pools[tier.which(table)].state, residents.homes[numbers.long()])

        return step

    def read(self, real):
        def arrived(engine, pending, selection, rows, x):
            found = real(engine, pending, selection, rows, x)
            for table, got in ((pending.layer.keys, found.keys), (pending.layer.values, found.values)):
                if not torch.equal(got, self.of(table)["table"][selection.host_rows].to(got.dtype)):
                    self.errors.append(f"a pass has read old rows of {table.name}")
            return found

        return arrived

    def check_reads(self):
        """Every pass has read the newest rows."""
        assert not self.errors

    def check(self):
        """So it has, and all is in the tables and in the optimizer's state."""
        self.check_reads()
        for table, expected in self.state.items():
            found = {"table": table.rows.detach()} | (table.moments.tensors() if table.moments else {})
            self.tiny.assert_equal(found, expected)


def train_on(tiny, model, optimizer, steps):
    """Steps of which some may end in an error; what was raised."""
    raised = []
    for number in steps:
        try:
            step(tiny, model, optimizer, number)
        except (RuntimeError, ZeroDivisionError) as error:
            error.__traceback__ = None
            raised.append(error)
    return raised


@pytest.mark.parametrize("strategy", ["host", "stream", "device-rows"])
def test_a_copy_that_fails_loses_no_row(tiny, monkeypatch, strategy):
    """In every other step another one: of the first of a step, of the second, and so on."""
    streams, failed = ThreadStreams(), 0
    model = model_of(tiny, streams=streams, retrieval=strategy)
    oracle, optimizer = Oracle(tiny, model, monkeypatch), tiny.adamw(model)
    assert not train_on(tiny, model, optimizer, range(3))
    for number, stream in itertools.product(range(12), ("inbound", "outbound")):
        streams.failing = {(stream, streams.numbers[stream] + number)}
        failed += bool(train_on(tiny, model, optimizer, [2 * number]))
        streams.failing = set()
        failed += bool(train_on(tiny, model, optimizer, [2 * number + 1]))
        oracle.check_reads()
    assert failed >= 6
    assert not train_on(tiny, model, optimizer, range(2))
    oracle.check()
    assert tier_of(model).places


@contextmanager
def failing(place, error, at):
    """The calls of a function from one to another raise."""
    owner, name = place
    real, calls = getattr(owner, name), itertools.count()

    @functools.wraps(real)
    def called(*args, **kwargs):
        if next(calls) in at:
            raise error
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, staticmethod(called) if name == "of" else called)
        yield lambda: next(calls)


IN_A_STEP = {
    "what leaves": (meft.tier.row_pool.RowPool, "rows"),
    "where it was": (meft.tier.layer_places, "sent"),
    "buffers of what enters": (LayerPlaces, "enter"),
    "places of what enters": (meft.tier.row_pool.RowPool, "put"),
    "who has a place": (meft.tier.residents, "sent"),
    "a step on the device": (LayerTier, "_step_some"),
}


@pytest.mark.parametrize("place", IN_A_STEP)
def test_a_step_without_memory_on_the_device_gives_places_back_and_is_the_same(tiny, place):
    expected = run(tiny, model_of(tiny, 0, layers=2))
    model = model_of(tiny, layers=2)
    optimizer = tiny.adamw(model)
    losses = [step(tiny, model, optimizer, number) for number in range(2)]
    before = tier_of(model).places
    with failing(IN_A_STEP[place], torch.OutOfMemoryError("none"), {1}) as calls:
        losses += [step(tiny, model, optimizer, number) for number in range(2, 5)]
        assert calls() > 1
    losses.append(step(tiny, model, optimizer, 5))
    assert losses == expected[0]
    tiny.assert_equal(tiny.whole_state(model), expected[1])
    assert tier_of(model).places == before // 2


def test_gradients_that_were_looked_at_are_stepped_on_the_host_where_the_device_has_no_memory_for_them(tiny):
    def train(model):
        optimizer, losses = tiny.adamw(model), []
        for number in range(5):
            optimizer.zero_grad()
            loss = tiny.loss(model, number)
            loss.backward()
            for table in tables_of(model):
                table.rows.grad = table.rows.grad * 0.5
            with failing((meft.tier.layer_tier, "sent"), torch.OutOfMemoryError("none"), {1} if number == 3 else ()):
                optimizer.step()
            losses.append(loss.item())
        return losses, tiny.whole_state(model)

    model = model_of(tiny)
    (expected, plain), (losses, state) = train(model_of(tiny, 0)), train(model)
    assert losses == expected
    tiny.assert_equal(state, plain)
    assert tier_of(model).places == int(SHARE * 2 * tiny.R / 2) // 2


def test_rows_come_home_one_by_one_where_the_device_has_memory_for_no_more(tiny):
    expected = run(tiny, model_of(tiny, 0))
    model, real = model_of(tiny), meft.tier.row_pool.RowPool.rows

    def one(pool, places):
        if len(places) > 1:
            raise torch.OutOfMemoryError("none")
        return real(pool, places)

    optimizer = tiny.adamw(model)
    losses = [step(tiny, model, optimizer, number) for number in range(6)]
    tiny.loss(model)
    assert tier_of(model).tiers[0].residents is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meft.tier.row_pool.RowPool, "rows", one)
        tiny.assert_equal(tiny.whole_state(model), expected[1])
    assert losses == expected[0]


@pytest.mark.parametrize("way", ["a pass", "a backward pass"])
def test_after_an_error_for_want_of_memory_there_are_half_as_many_places_in_the_pass_that_is_tried_again(
    tiny, monkeypatch, way
):
    model = model_of(tiny, layers=2)
    optimizer, errors, counted = tiny.adamw(model), [], []
    monkeypatch.setattr(meft.retrieval.engine, "out_of_memory_errors", lambda device: len(errors))
    for number in range(3):
        step(tiny, model, optimizer, number)
    before, real = tier_of(model).places, tiny.layers(model)[1].base_layer.forward

    def no_memory(*args):
        errors.append(None)
        raise torch.OutOfMemoryError("none")

    def fails(x):
        if way == "a pass":
            no_memory()
        x.register_hook(no_memory)
        return real(x)

    tiny.layers(model)[1].base_layer.forward = fails
    with pytest.raises(torch.OutOfMemoryError):
        step(tiny, model, optimizer, 3)
    tiny.layers(model)[1].base_layer.forward = lambda x: counted.append(tier_of(model).places) or real(x)
    step(tiny, model, optimizer, 3)
    assert counted == [0]  # the memory is the pass's
    assert tier_of(model).places == before // 2


FAULTS = {
    "what leaves": (meft.tier.row_pool.RowPool, "rows"),
    "where it was": (meft.tier.layer_places, "sent"),
    "places of what enters": (meft.tier.row_pool.RowPool, "put"),
    "who has a place": (meft.tier.residents, "sent"),
    "rows that come home": (RowTable, "take_back"),
    "rows that are read to enter": (RowTable, "state_of"),
    "a step on the device": (LayerTier, "_step_some"),
    "an update on the host": (RowTable, "update_masters"),
}


@pytest.mark.parametrize("place", FAULTS)
def test_what_fails_is_raised_each_time_and_loses_no_row(tiny, monkeypatch, place):
    model = model_of(tiny, layers=2)
    oracle, optimizer, raised = Oracle(tiny, model, monkeypatch), tiny.adamw(model), []
    assert not train_on(tiny, model, optimizer, range(2))
    for at in (range(1), range(3), range(1, 2), range(2, 4)):
        with failing(FAULTS[place], RuntimeError("on purpose"), at) as calls:
            found = train_on(tiny, model, optimizer, range(4))
            assert found or calls() <= at[0]
        raised += found
        oracle.check_reads()
        assert len(train_on(tiny, model, optimizer, range(2))) <= 1  # of the last update before
    assert all("on purpose" in str(error) for error in raised)
    assert len(raised) >= 3
    oracle.check()


# ---------------------------------------------------------------------- writes of which nobody tells


def test_a_write_that_bypasses_the_rows_class_is_an_error(tiny):
    """As compiled extensions write: torch counts it, but calls nothing before."""
    model = model_of(tiny)
    optimizer, table = tiny.adamw(model), tables_of(model)[1]
    for number in range(4):
        step(tiny, model, optimizer, number)
    tiny.loss(model)
    assert tier_of(model).tiers[0].residents is not None
    with torch.no_grad(), without_torch_function():
        table.rows.add_(1)
    with pytest.raises(RuntimeError, match="MEFT's values of layer 0 were written by compiled code while"):
        model.state_dict()
    run(tiny, model)  # all rows are on the host


# ---------------------------------------------------------------------- views that were kept


KEPT = {
    "a slice of .data": lambda table: table.rows.data[3:9],
    "an array": lambda table: table.rows.detach().numpy()[3:9],
    "an array of an array": lambda table: numpy.asarray(memoryview(table.rows.detach().numpy()))[3:9],
    "dlpack": lambda table: torch.from_dlpack(table.rows.detach())[3:9],
    "one of several": lambda table: table.rows.detach().split(3)[1],
    "a tensor of the storage": lambda table: torch.empty(0).set_(table.rows.untyped_storage(), 0, table.rows.shape)[
        3:9
    ],
    "a plain tensor": lambda table: table.rows.data.as_subclass(torch.Tensor)[3:9],
    "moments": lambda table: table.moments.exp_avg[3:9],
}


@pytest.mark.parametrize("first", [1, 4])
def test_a_late_write_into_a_view_that_was_kept_is_seen(tiny, first):
    """It was made before rows had places, or while they had; a kind in each layer."""
    found = []
    for share in (0, SHARE):
        model = model_of(tiny, share, layers=len(KEPT))
        optimizer, views, losses = tiny.adamw(model), [], []
        layers = model.base_model.engines["default"].layers
        for number in range(8):
            if number == first:
                views = [keep(table) for keep, layer in zip(KEPT.values(), layers, strict=True)
                         for table in (layer.keys, layer.values)]  # fmt: skip
            losses.append(step(tiny, model, optimizer, number))
            if number > 4:
                for table in tables_of(model):
                    table.wait_for_update()  # it may write into the same rows
                with torch.no_grad():
                    for view in views:
                        view += 0.01
        found.append((losses, tiny.whole_state(model)))
    assert found[0][0] == found[1][0]
    tiny.assert_equal(found[1][1], found[0][1])
