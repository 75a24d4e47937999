"""What several ranks of a machine are predicted to take and to reach."""

import pytest

from meft.cost.host_bytes import HostBytes
from meft.cost.memory import AdapterShape, Plan, Work
from meft.cost.ranks import RankBytes, host_bytes_of_ranks, tokens_per_second, union_of_ranks
from meft.cost.step_time import BaseModel, Ceilings

D, LAYERS = 4096, 32
SHAPE = AdapterShape(layers=LAYERS, d=D, r=6400, experts=80, probed=4, top_k=64, master=4, compute=2)
PLAN = Plan(SHAPE, Work(512, 1664), "stream")
BASE = BaseModel(256, 4 * D * D, 3 * D * 11008, D, 32_000 * D)
CARD = Ceilings(7.1e13, 9.4e11, 2.5e10, 2.5e10, 4e10, 4e10, 1e12)


def speed(ranks, shared):
    return tokens_per_second(PLAN, BASE, CARD, ranks, shared=shared, clipping=True, checkpointing=True)


def test_ranks_with_a_copy_each_get_slower_and_those_that_share_faster():
    assert speed(1, False) == speed(1, True)
    assert speed(8, False) < speed(4, False) < speed(2, False) < speed(2, True) < speed(4, True) < speed(8, True)


def test_the_union_grows_with_the_ranks_up_to_all_rows():
    unions = [union_of_ranks(PLAN, ranks) for ranks in (1, 2, 3, 4, 8, 16, 64)]
    assert unions[0] == 1664
    assert unions == sorted(set(unions))
    assert unions[-1] <= 6400 == union_of_ranks(PLAN, 10**6)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_what_a_rank_moves(accumulation):
    plan = Plan(SHAPE, Work(512, 1664, accumulation), "stream")
    alone = HostBytes(plan)
    one = RankBytes(plan, 1, True)
    assert (one.looked_at(), one.updated()) == (alone.looked_at(), alone.updated())
    apart, shared = (RankBytes(plan, 4, shared) for shared in (False, True))
    assert apart.updated() >= alone.updated()
    assert 0 <= 4 * shared.updated() - apart.updated() < 4 * alone.updated() / plan.step_union
    assert shared.looked_at() < apart.looked_at()


def test_memory_of_ranks_that_share_has_the_tables_once():
    own = PLAN.host_bytes()
    each, once = host_bytes_of_ranks(PLAN, 4, shared=True)
    assert each.keys() | {"masters", "moments", "compute copy, page-locked"} == own.keys()
    assert once["masters"] == own["masters"]
    assert host_bytes_of_ranks(PLAN, 4, shared=False)[1] == {}
    assert host_bytes_of_ranks(PLAN, 1, shared=True) == (own, {})
