"""The bound of a step: beside numbers made by hand where one resource decides, and its properties everywhere."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meft.cost.memory import AdapterShape, Plan, Work
from meft.cost.step_time import BaseModel, Ceilings, _Resource, step_time
from meft.retrieval.strategies import DEVICE_STRATEGIES

UNBOUND = Ceilings(*[math.inf] * 7)
TINY = AdapterShape(d=16, layers=3, r=64, experts=8, probed=2, top_k=4)
BASE = BaseModel(length=8, attention=1024, ffn=2048, attended=16, head=512)
NAMES = [field.name for field in dataclasses.fields(Ceilings)]

rates = st.floats(1e3, 1e9)
ceilings = st.builds(Ceilings, rates, rates, rates, rates, rates, rates, rates)
plans = st.builds(
    lambda union, tokens, accumulation, rows, strategy: Plan(TINY, Work(tokens, union, accumulation, rows), strategy),
    st.integers(1, 64),
    st.integers(1, 50),
    st.integers(1, 3),
    st.sampled_from(["save", "refetch"]),
    st.sampled_from(DEVICE_STRATEGIES),
)


def at(**fields):
    return dataclasses.replace(UNBOUND, **fields)


def seconds(strategy, ceilings, union=32, **fields):
    clipping, checkpointing = fields.pop("clipping", True), fields.pop("checkpointing", True)
    plan = Plan(TINY, Work(**({"tokens": 10, "union": union} | fields)), strategy)
    return step_time(plan, BASE, ceilings, clipping=clipping, checkpointing=checkpointing).seconds


@settings(max_examples=60)
@given(plan=plans, slow=ceilings, faster=st.sampled_from(NAMES), times=st.floats(1, 100), flags=st.booleans())
def test_no_ceiling_makes_a_step_longer_by_being_higher(plan, slow, faster, times, flags):
    fast = dataclasses.replace(slow, **{faster: getattr(slow, faster) * times})
    found = [step_time(plan, BASE, c, clipping=flags, checkpointing=not flags).seconds for c in (slow, fast)]
    assert found[1] <= found[0] * (1 + 1e-9)


@settings(max_examples=60)
@given(plan=plans, limits=ceilings, clipping=st.booleans())
def test_never_shorter_than_the_work_of_one_resource(plan, limits, clipping):
    found = step_time(plan, BASE, limits, clipping=clipping)
    assert found.seconds >= max(found.busy.values())
    assert found.seconds >= plan.crossing() / limits.both_ways
    assert found.busy["to device"] == pytest.approx(plan.crossing(to_device=True) / limits.to_device)
    assert found.busy["to host"] == pytest.approx(plan.crossing(to_device=False) / limits.to_host)
    assert 0 < found.share_of_compute <= 1
    # Nor longer than one thing after another.
    assert found.seconds <= sum(found.busy.values()) * (1 + 1e-9) or found.seconds == pytest.approx(
        plan.crossing() / limits.both_ways
    )


@settings(max_examples=30)
@given(plan=plans, flops=rates, memory=rates, clipping=st.booleans())
def test_compute_alone_where_all_else_is_free(plan, flops, memory, clipping):
    found = step_time(plan, BASE, at(flops=flops, device_bytes=memory), clipping=clipping)
    assert found.seconds == pytest.approx(found.busy["compute"])
    assert found.share_of_compute == pytest.approx(1)


def test_flops_by_hand():
    T, L, U = 10, 3, 32
    per_layer = 2 * T * (1024 + 2048) + 2 * T * 8 * 16  # projections, FFN, causal attention
    below = 2 * T * (1024 + 2048) + 5 * T * 8 * 16
    router, scores, sparse = 2 * T * 8 * 16, 2 * T * 16 * 16, 4 * T * U * 16
    once = per_layer + router + scores + sparse + 10 * T * U * 16 + below + 2 * router
    head = 4 * T * 512
    assert seconds("resident", at(flops=1.0), checkpointing=False) == L * once + head
    assert seconds("resident", at(flops=1.0)) == L * (once + per_layer + sparse) + head


@pytest.mark.parametrize("strategy", DEVICE_STRATEGIES[1:])
def test_host_memory_by_hand(strategy):
    """Gradients come in bf16, are kept so, and the update takes 28 bytes a value, clipping none.

    Of two micro-batches both are written in fp32, the second one's are read and added to the first one's, of whose sum
    the norm takes 4, and the update 30.
    """
    values = 3 * 2 * 16 * 32
    scoring = 3 * 64 * 16 * 2 if strategy == "host" else 0
    for clipping in (True, False):
        found = seconds(strategy, at(host_bytes=1.0), clipping=clipping)
        assert found == pytest.approx(values * (4 + 28) + scoring)
        twice = seconds(strategy, at(host_bytes=1.0), clipping=clipping, accumulation=2, step_union=32)
        assert twice == pytest.approx(values * (6 + 6 + 12 + 30 + 4) + 2 * scoring)


def test_link_by_hand():
    rows = 2 * 16 * 32 * 2  # bytes of the rows of U, one layer
    assert seconds("device-rows", at(to_host=1.0)) == pytest.approx(3 * (rows + 32 * 4))
    assert seconds("device-rows", at(to_device=1.0)) == pytest.approx(3 * rows)
    assert seconds("stream", at(to_device=1.0)) == pytest.approx(3 * (64 * 16 * 2 + rows / 2))
    assert seconds("stream", at(both_ways=1.0)) == pytest.approx(3 * (64 * 16 * 2 + rows * 1.5 + 32 * 4))


def test_keys_hide_under_the_layer_before_and_values_do_not():
    compute = at(flops=1e6)
    free = seconds("stream", compute, union=1)
    table = 64 * 16 * 2
    # The slowest copy that hides: one table in the shortest part of a step from pick to pick.
    assert seconds("stream", dataclasses.replace(compute, to_device=table / (free / 60)), union=1) < free * 1.03
    # Values of l wait for l's picks: with a base FFN that takes no time, nothing hides them.
    no_ffn = dataclasses.replace(BASE, ffn=0)
    plan = Plan(TINY, Work(10, 32), "device-keys")
    alone = step_time(plan, no_ffn, compute).seconds
    slow = dataclasses.replace(compute, to_device=1e6)
    rows = 16 * 32 * 2 / 1e6
    assert step_time(plan, no_ffn, slow).seconds >= alone + 3 * rows * 0.999


def test_clipping_waits_for_all_gradients():
    limits = at(flops=1e6, host_bytes=1e6)
    assert seconds("device-rows", limits, clipping=False) < seconds("device-rows", limits)


def test_longer_work_takes_longer():
    limits = Ceilings(1e6, 1e7, 1e6, 1e6, 1.5e6, 1e7, 1e6)
    for strategy in DEVICE_STRATEGIES:
        few, many = (seconds(strategy, limits, union=u) for u in (8, 64))
        assert few < many
        assert seconds(strategy, limits) < seconds(strategy, limits, accumulation=4)
    limits = dataclasses.replace(limits, to_device=2e4)
    assert seconds("stream", limits) < seconds("stream", limits, rows="refetch")


def test_a_resource_fills_gaps_with_later_work():
    one = _Resource()
    assert one.run(2.0, 10.0) == 12.0
    assert one.run(3.0, 8.0) == 13.0  # two before, one after
    assert one.run(1.0) == 1.0
    assert one.run(8.0) == 14.0
    assert one.run(1.0, 20.0, 5.0) == 21.0
    assert one.busy == 15.0
