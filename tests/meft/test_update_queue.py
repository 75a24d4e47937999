"""In which order queued updates are done."""

from concurrent.futures import Future

import pytest
import torch

from meft.table.update_queue import UpdateQueue


class Queued:
    """A queue whose thread is held until `go`, and what it has done."""

    def __init__(self):
        self.queue, self.done, self.held = UpdateQueue(), [], Future()
        self.queue.add(lambda: self.held.result(60), "rows")

    def add(self, name, ready=None, turn=0):
        return self.queue.add(lambda: self.done.append(name), name, ready=ready, turn=turn)

    def go(self, *pending):
        self.held.set_result(None)
        for one in pending:
            one.wait()
        return self.done


@pytest.fixture
def queued():
    return Queued()


def test_updates_go_in_their_turn(queued):
    assert queued.go(*[queued.add(name) for name in "abc"]) == ["a", "b", "c"]


def test_those_that_are_ready_go_in_the_order_in_which_they_are_needed(queued):
    ready = [Future() for _ in range(4)]
    pending = [queued.add(turn, each, turn) for turn, each in enumerate(ready)]
    for turn in (3, 2, 1):
        ready[turn].set_result(None)
    assert queued.go(*pending[1:]) == [1, 2, 3]
    ready[0].set_result(None)
    pending[0].wait()
    assert queued.done == [1, 2, 3, 0]


def test_what_is_ready_at_once(queued):
    ready = Future()
    ready.set_result(None)
    assert queued.go(queued.add("b", ready, 1), queued.add("a", ready, 0)) == ["a", "b"]


def test_keys_come_before_values_and_lower_layers_before_upper_ones(tiny):
    model = tiny.adapted(layers=2)
    layers = model.base_model.engines["default"].layers
    tables = [table for layer in layers for table in (layer.keys, layer.values)]
    assert [table.turn for table in tables] == [0, 1, 2, 3]


def test_layers_that_are_divided_among_devices_keep_their_turns_and_names(tiny):
    engine = tiny.adapted(layers=4).base_model.engines["default"]
    engine._divide([torch.device(name) for name in ("cpu", "cpu", "meta", "meta")])
    assert [layer.keys.turn for layer in engine.layers] == [0, 2, 4, 6]
    assert [layer.values.name for layer in engine.layers] == [f"values of layer {i}" for i in range(4)]


def test_nothing_goes_before_what_it_was_queued_behind(queued):
    """Though it is not ready: the update itself waits for what it reads."""
    late, ready = Future(), Future()
    ready.set_result(None)
    first = [queued.add("ready", ready), queued.add("late", late)]
    behind = queued.add("behind")
    last = queued.add("last", ready)
    assert queued.go(*first, behind, last) == ["ready", "late", "behind", "last"]
    late.set_result(None)
    queued.add("after").wait()
    assert queued.done == ["ready", "late", "behind", "last", "after"]


def test_what_is_ready_as_the_interpreter_ends_is_done(queued):
    """`atexit` is later: what is registered there may save the rows."""
    ready = Future()
    pending = queued.add("last", ready)
    queued.held.set_result(None)
    queued.queue._thread.shutdown()
    ready.set_result(None)
    pending.wait()
    assert queued.done == ["last"]


def test_an_update_whose_wait_failed_is_done_and_tells_of_it(queued):
    ready = Future()
    pending = queued.queue.add(lambda: ready.result(), "keys", ready=ready)
    ready.set_exception(ValueError("lost"))
    queued.held.set_result(None)
    with pytest.raises(RuntimeError, match="The update of MEFT's keys failed: lost"):
        pending.wait()
