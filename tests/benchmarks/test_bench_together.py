"""The engine behind a link and a host like a card's: their rates, and what shares the host."""

import threading
import time

import pytest

from aslora_meft.planner.rates import ceilings
from benchmarks.step_bound import together
from benchmarks.step_bound.__main__ import FFN, HEAD, D, plan_of
from meft.cost.host_bytes import HostBytes
from meft.cost.step_time import BaseModel, step_time


@pytest.mark.parametrize("card", together.CARDS)
def test_rates_stand_to_computing_as_on_the_card(card):
    whole = step_time(plan_of("stream", 6400, 512, 0.26, 1), BaseModel(256, 4 * D * D, FFN, D, HEAD), ceilings(card))
    rates = together.rates_of(card)
    plan = together.small_plan(together.config_of("stream", "float32", "clipping"), "stream")
    moved = [together.DEPTH * sum(f.bytes for f in plan.flows() if f.to_device == way) for way in (True, False)]
    moved.append(together.DEPTH * (HostBytes(plan).drained(0) + HostBytes(plan).updated()))
    for size, rate, name in zip(moved, rates, ("to device", "to host", "host"), strict=True):
        expected = whole.busy[name] / whole.busy["compute"]
        assert size / rate / together.COMPUTING == pytest.approx(expected)


def test_the_bound_has_what_was_measured():
    config = together.config_of("stream", "narrowest", "in_backward")
    free = (together.FREE,) * 3
    assert together.bound(config, 0.5, free) == pytest.approx(0.5, rel=1e-3)
    slow = together.bound(config, 0.5, (together.FREE, together.FREE, 1e5))
    plan = together.small_plan(config, "stream")
    host = together.DEPTH * (HostBytes(plan).drained(0) + HostBytes(plan).updated()) / 1e5
    assert slow == pytest.approx(host, rel=0.2)


def test_those_who_ask_at_the_same_time_share_the_host():
    host, began = together.Host(1000.0), time.perf_counter()
    threads = [threading.Thread(target=host.take, args=(20.0,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.perf_counter() - began >= 0.06


def test_an_update_gives_way_to_what_does_not():
    host, taken = together.Host(1000.0), {}

    def take(name: str, size: float, gives_way: bool) -> None:
        began = time.perf_counter()
        host.take(size, gives_way=gives_way)
        taken[name] = time.perf_counter() - began

    threads = [threading.Thread(target=take, args=one) for one in (("update", 300.0, True), ("drain", 300.0, False))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0.3 <= taken["drain"] < 0.45  # and not 0.6, as if they shared it
    assert taken["update"] >= 0.45
