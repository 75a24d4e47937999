"""What rows with a place on the device take and save, as the planner says it."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from meft.cost.auto import left_at_peak
from meft.cost.fit import strategies_that_fit, with_hot_rows
from meft.cost.host_bytes import HostBytes
from meft.cost.hot_rows import HotRows, place_bytes, share_of
from meft.cost.memory import AdapterShape, Plan, Work
from meft.cost.step_time import BaseModel, Ceilings, step_time
from meft.retrieval.strategies import STRATEGIES
from meft.tier import row_pool
from tests.support.thread_streams import on_streams

SHAPE = AdapterShape(d=4096, layers=32, r=6400, experts=320, probed=8, top_k=64)
BASE = BaseModel(256, 4 * 4096**2, 3 * 4096 * 11008, 4096, 32000 * 4096)
RTX3090 = Ceilings(71e12, 936e9, 25e9, 25e9, 40e9, 40e9, 6.4e11)
HOST_STRATEGIES = [name for name, strategy in STRATEGIES.items() if strategy.placement == "host"]


def plan(strategy="stream", hot=0.0, union=1664, **fields):
    return Plan(SHAPE, Work(512, union, **fields), strategy, hot)


@pytest.mark.parametrize(("strategy", "moments"), [("stream", "float32"), ("host", "rowwise"), ("stream", "float8")])
def test_a_place_takes_what_the_tier_makes_for_it(tiny, strategy, moments):
    model = tiny.adapted(
        2,
        torch.bfloat16,
        master_dtype="float32",
        retrieval=strategy,
        device_rows=0.5,
        row_optimizer={"moments": moments},
    )
    on_streams(model)
    tiny.train(model, 1)
    (tier,) = model.base_model.engines["default"].tiers
    shape = AdapterShape.of(model.peft_config["default"], d=tiny.WIDTH, layers=2, base_dtype=torch.bfloat16)
    each = sum(row_pool.place_bytes(pool.form) for pool in tier.pools)
    assert place_bytes(shape, values_alone=strategy == "host") == each
    planned = with_hot_rows(Plan(shape, Work(14, 20), strategy), 0.5)
    assert planned.places() == tier.places * each
    assert planned.device_bytes()["hot rows"] == planned.places()


def test_a_bfloat16_row_takes_18_bytes_a_value_and_14_without_its_gradient():
    assert place_bytes(SHAPE) == 2 * (18 * 4096 + 4)
    assert place_bytes(replace(SHAPE, master=2, mode="rowwise")) < place_bytes(SHAPE) / 2


@pytest.mark.parametrize("strategy", HOST_STRATEGIES)
@pytest.mark.parametrize("accumulation", [1, 16])
def test_more_places_move_less_and_leave_less_to_the_host(strategy, accumulation):
    plans = [plan(strategy, hot, accumulation=accumulation) for hot in (0, 0.1, 0.366, 0.7, 1)]
    assert all(a.crossing() > b.crossing() for a, b in pairwise(plans))
    updated = [HostBytes(each.on_host()).updated() for each in plans]
    assert all(a > b for a, b in pairwise(updated))
    seconds = [step_time(each, BASE, RTX3090).seconds for each in plans]
    assert seconds[2] <= (0.9 if accumulation == 1 else 1.02) * seconds[0]


def test_shares_are_those_of_the_trace():
    """What `python -m benchmarks.hot_rows` counts, with all that moves and the bytes of `stream`."""
    without, hot = (plan("stream", share, union=2976) for share in (0, 0.366))
    rows = ("key table", "value rows", "row gradients", "rows that get a place", "rows that leave their place")
    moved = [sum(flow.bytes for flow in each.flows() if flow.what in rows) for each in (without, hot)]
    assert moved[1] / moved[0] == pytest.approx(0.456, abs=0.02)
    assert HostBytes(hot.on_host()).updated() / HostBytes(without).updated() == pytest.approx(0.298, abs=0.001)
    assert HotRows(0.366).swapped == pytest.approx(0.004)


def test_with_all_rows_on_the_device_a_step_of_many_micro_batches_leaves_nothing_to_the_host():
    work = Work(512, 1664, accumulation=16)
    assert HotRows(1.0).stepped(SHAPE, work) == SHAPE.r
    assert HotRows(0.366).stepped(SHAPE, work) == pytest.approx(0.366 * SHAPE.r)


def test_places_take_part_in_what_fits():
    work = Work(512, 1664)
    free = sum(plan("stream").device_bytes().values()) + 2**20
    assert "stream" in [found.strategy for found in strategies_that_fit(SHAPE, work, free)]
    assert "stream" not in [found.strategy for found in strategies_that_fit(SHAPE, work, free, device_rows=0.1)]
    assert "stream" in [found.strategy for found in strategies_that_fit(SHAPE, work, free, device_rows="auto")]
    assert share_of("8GiB", SHAPE, values_alone=False, free=0) == pytest.approx(0.284, abs=0.001)
    assert share_of("auto", SHAPE, values_alone=False, free=-5) == 0
    assert with_hot_rows(plan("resident"), 0.5).hot == 0


@pytest.mark.parametrize(("fraction", "expected"), [(1.0, 24 - 15 - 1.2), (0.75, 18 - 15 - 1.2), (0.5, 0)])
def test_auto_leaves_the_memory_that_the_first_step_had_at_its_peak(tiny, monkeypatch, fraction, expected):
    """Of 24 GiB a step has had 15 at its peak, and has 10 now, of 16 that torch's allocator keeps."""
    gib = 2**30
    of_card = {
        "mem_get_info": (8 * gib, 24 * gib), "max_memory_allocated": 15 * gib, "memory_allocated": 10 * gib,
        "memory_reserved": 16 * gib, "get_per_process_memory_fraction": fraction,
    }  # fmt: skip
    for name, value in of_card.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert left_at_peak(torch.device("cuda", 0)) == pytest.approx(expected * gib)
    model = tiny.adapted(1, torch.bfloat16, master_dtype="float32", retrieval="stream", device_rows="auto")
    engine = model.base_model.engines["default"]
    assert engine._places(0.5, torch.device("cuda", 0), 10**9, 1160, gib) == int((expected * gib + gib) * 0.5) // 1160
    assert engine._places(1.0, torch.device("cpu"), 10**9, 1160, 0) == 0
