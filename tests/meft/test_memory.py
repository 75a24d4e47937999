"""The plan's arithmetic beside numbers made by hand."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meft import MEFTConfig
from meft.cost.fit import largest_that_fits, strategies_that_fit
from meft.cost.memory import AdapterShape, Plan, Work
from meft.retrieval.strategies import DEVICE_STRATEGIES

GIB = 2**30
OF_ROWS = ("key table", "key and value rows", "value rows", "changed keys", "changed rows", "row gradients")
D, L, R, E, T = 4096, 32, 6400, 320, 512
U = 1664  # 0.26 r
LLAMA_7B = AdapterShape.of(MEFTConfig(r=R), d=D, layers=L, base_dtype=torch.bfloat16)


def plan(strategy, *, shape=LLAMA_7B, **work):
    return Plan(shape, Work(**({"tokens": T, "union": U} | work)), strategy)


def test_sizes_of_the_paper():
    assert AdapterShape(D, L, R, E, 8, 64) == LLAMA_7B
    assert LLAMA_7B.values == 1_677_721_600
    host = plan("stream").host_bytes()
    assert host["compute copy, page-locked"] == 3_355_443_200
    assert host["masters"] == 4 * 1_677_721_600
    lasting = [host[name] for name in ("compute copy, page-locked", "masters", "moments")]
    assert sum(lasting) == 14 * 1_677_721_600 == 23_488_102_400
    assert host["gradient store"] == 2 * L * D * U * 2 == 872_415_232
    assert host["gradient store, kept for larger ones"] == host["gradient store"] // 8  # as the pool's test has it
    assert host["gradient ring, page-locked"] == 4 * 2 * U * D * 2
    added_up = plan("stream", accumulation=2, step_union=U).host_bytes()
    assert added_up["gradient store"] == 2 * host["gradient store"]


def test_gradients_are_kept_as_they_come_in_host_memory_alone():
    """Those on the device are in fp32, those of float64 masters in float64."""
    assert [plan(way).kept_gradient for way in ("stream", "host", "resident")] == [2, 2, 4]
    float64 = replace(LLAMA_7B, master=8)
    assert [plan("stream", shape=float64, accumulation=n).kept_gradient for n in (1, 2)] == [8, 8]


def test_device_parts_of_streaming():
    parts = plan("stream").device_bytes()
    assert parts["router"] == parts["gradients"] == parts["optimizer"] / 2 == L * E * D * 4
    assert parts["adapter"] == 0
    assert parts["key buffers"] == 2 * R * D * 2
    assert parts["saved rows"] == 2 * L * D * U * 2
    assert round(parts["saved rows"] / GIB, 2) == 0.81
    assert round(plan("stream", union=3840).device_bytes()["saved rows"] / GIB, 2) == 1.88
    refetched = plan("stream", rows="refetch").device_bytes()
    assert refetched["saved rows"] == 0
    assert refetched["buffers"] - parts["buffers"] == 2 * D * U * 2


def test_tables_on_the_device():
    assert plan("device-keys").device_bytes()["adapter"] == L * R * D * 2
    assert plan("device-rows").device_bytes()["adapter"] == 2 * L * R * D * 2
    resident = plan("resident").device_bytes()
    assert resident["adapter"] == 6 * LLAMA_7B.values
    assert resident["optimizer"] == 8 * LLAMA_7B.values + 2 * L * E * D * 4
    assert plan("resident").host_bytes() == {}
    assert plan("resident").flows() == []
    assert plan("device-rows").device_bytes()["saved rows"] == 0


@pytest.mark.parametrize(
    ("strategy", "rows", "at_step", "within"),
    [
        ("host", "save", 4 * D * U, 4 * D * U),
        ("host", "refetch", 6 * D * U, 6 * D * U),
        ("stream", "save", R * D + 3 * D * U, R * D + 3 * D * U),
        ("stream", "refetch", R * D + 5 * D * U, R * D + 5 * D * U),
        ("device-keys", "save", 4 * D * U, 3 * D * U),
        ("device-keys", "refetch", 5 * D * U, 4 * D * U),
        ("device-rows", "save", 4 * D * U, 2 * D * U),
        ("device-rows", "refetch", 4 * D * U, 2 * D * U),
        ("resident", "save", 0, 0),
    ],
)
def test_rows_that_cross(strategy, rows, at_step, within):
    flows = [flow for flow in plan(strategy, rows=rows).flows() if flow.what in OF_ROWS]
    assert sum(flow.elements for flow in flows) == at_step
    assert sum(flow.elements for flow in flows if flow.when != "step") == within


def test_what_the_host_strategy_moves_beside_rows():
    flows = {flow.what: flow for flow in plan("host").flows()}
    assert (flows["hidden states"].elements, flows["hidden states"].bytes) == (T * D, 2 * T * D)
    assert (flows["router logits"].elements, flows["router logits"].bytes) == (T * E, 4 * T * E)
    assert (flows["picks"].elements, flows["picks"].bytes) == (2 * T * 64, 8 * T * 64)
    assert flows["union ids"].bytes == 4 * U


def test_share_of_all_values_that_the_paper_reports():
    """r 6144, batch 2, length 256: 0.56 of the values and their gradients of |U| = 0.26 r, counting T d and ids."""
    shape = AdapterShape.of(MEFTConfig(r=6144), d=D, layers=L, base_dtype=torch.bfloat16)
    planned = plan("host", shape=shape, union=round(0.26 * 6144))
    moved = L * sum(flow.elements for flow in planned.flows())
    assert 0.52 < moved / shape.values < 0.57
    streamed = plan("stream", shape=shape, union=round(0.26 * 6144))
    assert round(L * sum(flow.elements for flow in streamed.flows() if flow.what in OF_ROWS) / shape.values, 2) == 0.89


def test_accumulation():
    once, often = plan("device-rows"), plan("device-rows", accumulation=16)
    assert once.crossing(to_device=True) == L * 2 * D * U * 2
    assert often.crossing(to_device=True) == L * 2 * D * R * 2  # 16 |U| is more than r
    assert often.crossing(to_device=False) == 16 * once.crossing(to_device=False)
    assert plan("device-rows", accumulation=16, step_union=2000).crossing(to_device=True) == L * 2 * D * 2000 * 2
    assert often.host_bytes()["gradient store"] == 2 * L * D * R * 4


def test_wide_base_reads_the_masters():
    shape = AdapterShape.of(MEFTConfig(r=64), d=32, layers=2, base_dtype=torch.float32)
    host = plan("stream", shape=shape, tokens=8, union=10).host_bytes()
    assert host["compute copy, page-locked"] == 0
    assert host["masters, page-locked"] == 2 * 2 * 64 * 32 * 4
    assert plan("resident", shape=shape, tokens=8, union=10).device_bytes()["adapter"] == 2 * 2 * 64 * 32 * 4


def test_what_fits_comes_in_order_of_preference():
    def names(free, **fields):
        return [
            (found.strategy, found.work.rows) for found in strategies_that_fit(LLAMA_7B, Work(T, U), free, **fields)
        ]

    saved = [("device-keys", "save"), ("stream", "save"), ("host", "save")]
    assert names(10 * GIB) == [("device-rows", "save"), *saved]
    assert names(int(3.6 * GIB)) == saved
    assert names(2 * GIB) == [("stream", "save"), ("host", "save")]
    assert names(int(1.2 * GIB)) == [("stream", "refetch"), ("host", "refetch")]
    assert names(2**20) == []
    assert names(30 * GIB, placement="device") == [("resident", "save")]
    assert names(10 * GIB, placement="device") == []


@given(
    union=st.integers(1, 64),
    tokens=st.integers(1, 100),
    strategy=st.sampled_from(DEVICE_STRATEGIES),
    rows=st.sampled_from(["save", "refetch"]),
    accumulation=st.integers(1, 4),
)
def test_more_of_anything_never_takes_less(union, tokens, strategy, rows, accumulation):
    def sizes(union, tokens, accumulation):
        shape = AdapterShape(d=16, layers=3, r=64, experts=8, probed=2, top_k=4)
        planned = Plan(shape, Work(tokens, union, accumulation, rows), strategy)  # type: ignore[arg-type]
        return [*planned.device_bytes().values(), *planned.host_bytes().values(), planned.crossing()]

    more = sizes(min(64, union + 1), tokens + 1, accumulation + 1)
    assert all(a <= b for a, b in zip(sizes(union, tokens, accumulation), more, strict=True))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"strategy": "paper"}, "strategy='paper'"),
        ({"strategy": "host", "union": 0}, "union=0"),
        ({"strategy": "host", "union": R + 1}, "union=6401"),
        ({"strategy": "host", "rows": "keep"}, "rows='keep'"),
        ({"strategy": "host", "accumulation": 0}, "accumulation=0"),
    ],
)
def test_impossible_sizes_are_named(fields, named):
    with pytest.raises(ValueError, match=named):
        plan(fields.pop("strategy"), **fields)


def test_largest_that_fits():
    asked = []
    assert largest_that_fits(lambda n: asked.append(n) or n <= 6400, 1 << 20, 64) == 6400
    assert len(asked) <= 15
    assert largest_that_fits(lambda n: False, 100) == 0
    assert largest_that_fits(lambda n: True, 100, 64) == 64
