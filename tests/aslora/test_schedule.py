"""When merges are taken: the published steps, shares of a run, and the plan's invariants."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aslora import ASLoRAConfig
from aslora.sharing.merge_math import planned_merges
from aslora.sharing.schedule import due, merge_steps, uses_published_steps


def plan(merges, total_steps=None, warmup_steps=0, **fields):
    return merge_steps(ASLoRAConfig(**fields), merges, total_steps, warmup_steps)


def algorithm_1(start, interval, merges, last):
    """The condition in the paper's loop, read literally."""
    steps = []
    for t in range(1, last + 1):
        if t > start and (t - start) % interval == 0 and len(steps) < merges:
            steps.append(t)
    return steps


def test_the_published_steps_where_the_length_is_unknown():
    steps = plan(7)
    assert steps == algorithm_1(320, 240, 7, 5000)
    assert steps[0] == 560


def test_a_known_length_spreads_the_merges_from_5_to_30_percent():
    assert plan(5, 1000) == [100, 150, 200, 250, 300]
    assert plan(7, 1000) == [86, 122, 158, 193, 229, 265, 300]
    assert plan(3, 20) == [3, 5, 6]
    assert plan(7, 20) == [2, 3, 4, 4, 5, 6, 6]  # several at one step if they must
    assert plan(7, 1) == [1] * 7


def test_the_defaults_count_from_the_end_of_the_warm_up():
    assert plan(5, 1060, 60) == [160, 210, 260, 310, 360]
    assert plan(18, 12, 1) == [2] * 6 + [3] * 6 + [4] * 6
    assert plan(5, 1000, 1000) == plan(5, 1000, 2000) == plan(5, 1000)  # a rise without an end
    assert plan(5, None, 60) == plan(5)
    assert plan(2, 1060, 60, merge_start=0.1, merge_interval=10) == [116, 126]  # what is set is of the whole run


def test_ints_are_steps_whatever_the_length():
    for total in (None, 10, 10_000):
        assert plan(3, total, merge_start=5, merge_interval=2) == algorithm_1(5, 2, 3, 100)


def test_floats_are_shares_of_the_run_rounded_down_and_an_interval_is_at_least_one_step():
    assert plan(3, 99, merge_start=0.1, merge_interval=0.05) == [13, 17, 21]
    assert plan(3, 10, merge_start=0.0, merge_interval=0.01) == [1, 2, 3]


@pytest.mark.parametrize(("share", "total", "start"), [(0.29, 100, 29), (0.57, 100, 57), (0.07, 100, 7)])
def test_a_share_is_the_decimal_number_that_was_written(share, total, start):
    assert math.floor(share * total) <= start  # binary floats fall short of some
    assert plan(1, total, merge_start=share, merge_interval=1) == [start + 1]


@pytest.mark.parametrize("fields", [{"merge_start": 0.1}, {"merge_interval": 0.1}], ids=str)
def test_a_share_of_an_unknown_length_is_an_error_that_names_it(fields):
    (name, value), *_ = fields.items()
    with pytest.raises(ValueError, match=f"{name}={value}.*set total_steps.*give {name} as an int"):
        plan(3, None, **fields)


def test_one_field_set_leaves_the_other_at_its_default():
    assert plan(2, None, merge_start=10) == [250, 490]
    assert plan(2, None, merge_interval=10) == [330, 340]
    assert plan(2, 100, merge_start=10) == [20, 30]  # evenly from 10 to the default's end
    assert plan(2, 100, merge_interval=10) == [15, 25]


def test_who_uses_the_published_steps():
    assert uses_published_steps(ASLoRAConfig(), None)
    assert uses_published_steps(ASLoRAConfig(merge_start=1), None)
    assert not uses_published_steps(ASLoRAConfig(merge_start=1, merge_interval=1), None)
    assert not uses_published_steps(ASLoRAConfig(), 100)


# ---------------------------------------------------------------------- invariants

shares = st.integers(0, 999).map(lambda n: n / 1000)
starts = st.one_of(st.none(), st.integers(0, 2000), shares)
intervals = st.one_of(st.none(), st.integers(1, 500), shares.filter(bool))


@given(start=starts, interval=intervals, merges=st.integers(0, 40), total=st.integers(1, 5000))
def test_a_plan_is_complete_ascending_and_after_its_start(start, interval, merges, total):
    steps = plan(merges, total, merge_start=start, merge_interval=interval)
    begin = math.floor(Fraction(str(start)) * total) if isinstance(start, float) else start
    begin = total // 20 if begin is None else begin
    assert len(steps) == merges
    assert steps == sorted(steps)
    assert all(step > begin for step in steps)
    if interval is not None:
        gap = interval if isinstance(interval, int) else max(1, math.floor(Fraction(str(interval)) * total))
        assert steps == algorithm_1(begin, gap, merges, begin + merges * gap)


@given(layers=st.integers(2, 100), settled=st.integers(1, 100_000), warmup=st.integers(0, 1000))
def test_the_default_plan_ends_at_30_percent_in_even_steps(layers, settled, warmup):
    merges = planned_merges(layers, None)
    total = settled + warmup
    steps = plan(merges, total, warmup)
    begin, end = warmup + settled // 20, warmup + 3 * settled // 10
    assert steps[-1] == max(end, begin + 1)
    gaps = [after - before for before, after in zip([begin, *steps], steps, strict=False)]
    assert max(gaps) - min(gaps) <= 1 or end - begin < merges
    assert steps[-1] <= total


@given(steps=st.lists(st.integers(1, 50)).map(sorted), now=st.integers(0, 60))
def test_due_counts_the_steps_up_to_now(steps, now):
    assert due(steps, now) == sum(step <= now for step in steps)


@pytest.mark.parametrize(("start", "last"), [(0.0, 30), (0.2, 30), (0.5, 100), (0.9, 100)])
def test_a_start_alone_spreads_the_merges_to_the_end_of_the_window(start, last):
    steps = merge_steps(ASLoRAConfig(merge_start=start), 7, 100)
    assert steps[-1] == last
    assert steps[0] > start * 100
