"""What the 24 GB benchmark plans, counts, keeps and judges."""

import time
from dataclasses import replace

import pytest
import torch

from aslora_meft.planner.rates import ceilings
from benchmarks.card_24gb import __main__ as bench
from benchmarks.card_24gb import bound, models, plan
from benchmarks.card_24gb import worker as work
from benchmarks.card_24gb.report.rows import Rows, environment
from benchmarks.card_24gb.report.targets import MET, MISSED, OPEN, targets
from benchmarks.card_24gb.traffic import expected_bytes
from benchmarks.step_bound import __main__ as model_24gb
from meft import MEFTConfig

CELL = plan.Cell("llama-2-7b", "bf16", 2, 256, 1, True, 6400, "meft auto", "0.26")
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


# --------------------------------------------------------------------------------------------------- plan and formula


def test_plan_has_what_the_issue_asks():
    groups = list(plan.plan())
    first = groups[0].cells
    assert {c.contestant for c in first} == {
        *(f"meft {name}" for name in ("host", "stream", "device-keys", "device-rows", "auto")), "null", "lora", "qlora",
        *(f"dense {name}" for name in ("adamw", "adamw8bit", "paged", "torchao")),
    }  # fmt: skip
    assert {c.routing for c in first} == {"-", "0.1", "0.26", "0.6", "1.0", "recorded"}
    everything = {cell for group in plan.plan(full=True) for cell in group.cells}
    for field, values in {
        "model": {"llama-2-7b", "mistral-7b"}, "base": {"bf16", "nf4"}, "accumulation": {1, 16}, "clip": {True, False},
    }.items():  # fmt: skip
        assert {getattr(cell, field) for cell in everything} == values
    assert {(c.batch, c.length) for c in everything} == {(1, 256), (2, 256), (4, 256), (8, 256), (1, 2048)}
    assert {3072, 6400, 8464} <= {c.r for c in everything}
    for group in groups:
        assert len(set(group.cells)) == len(group.cells)
        assert sorted(c.title() for job in group.jobs() for c in job) == sorted(c.title() for c in group.cells)


@pytest.mark.parametrize(("name", "billions"), [("llama-2-7b", 6.738), ("mistral-7b", 7.242)])
def test_shapes_are_the_published_ones(name, billions):
    with torch.device("meta"):
        model = models.SHAPES[name][0][0](models.config_of(name))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=5e-4)


@pytest.mark.parametrize(
    ("strategy", "elements"),
    # In elements of two bytes, as the issue has them: 4 d|U| + T d, r d + 3 d|U|, 4 d|U|, 4 d|U|.
    [("host", 4 * 1664 + 512), ("stream", 6400 + 3 * 1664), ("device-keys", 4 * 1664), ("device-rows", 4 * 1664)],
)
def test_formula(strategy, elements):
    ways = expected_bytes(
        strategy, CELL, d=4096, layers=32, experts=320, top_k=64, union=1664, stepped=1664 / 6400
    )  # fmt: skip
    told = 4 * (1 + 6400)  # the union's size, and room for its ids
    small = {
        "host": 4 * 1664 + 4 * 512 * 64 + 4 * 512 * 320,
        "stream": told,
        "device-keys": told + 4 * 1664,
        "device-rows": told + 2 * 4 * 1664,
    }[strategy]
    assert sum(ways) == 32 * (2 * 4096 * elements + small)
    again = expected_bytes(
        strategy, CELL, d=4096, layers=32, experts=320, top_k=64, union=1664, stepped=1664 / 6400, refetch=True
    )
    brought = {"device-keys": 1, "device-rows": 0}.get(strategy, 2)
    assert again == (ways[0] + 32 * 2 * 4096 * brought * 1664, ways[1])
    assert expected_bytes("resident", CELL, d=1, layers=1, experts=1, top_k=1, union=1, stepped=None) == (0, 0)
    assert expected_bytes(None, CELL, d=1, layers=1, experts=1, top_k=1, union=1, stepped=None) is None


# ---------------------------------------------------------------------------------------------------- rows and targets


def row(cell=CELL, **fields):
    base = {"status": "measured", "ms_of_rounds": [100.0, 120.0], "ms_q50": 110.0, "device_gib": 20.0}
    return {**cell.key, **base, **fields}


def test_rows_are_kept_replaced_and_tried_again(tmp_path):
    rows = Rows(tmp_path / "new" / "rows.json")
    for status, done in (("error: x", False), ("wrong: y", False), ("OOM", True), ("measured", True)):
        rows.add(row(status=status), {"gpu": "one"}, "a")
        rows = Rows(rows.path)
        assert len(rows.rows) == 1
        assert rows.done(CELL) is done
    assert not rows.done(replace(CELL, clip=False))
    assert [path.name for path in rows.path.parent.iterdir()] == ["rows.json"]
    rows.add(row(replace(CELL, r=3072)), {"gpu": "two"}, "b")
    assert [r["environment"] for r in rows.rows] == [0, 1]


def test_ratios_are_of_one_invocation(tmp_path):
    rows = Rows(tmp_path / "rows.json")
    null = replace(CELL, contestant="null")
    rows.add(row(null, ms_of_rounds=[80.0, 90.0]), {}, "old")
    rows.add(row(), {}, "new")
    rows.compare("new")
    assert "of_null" not in rows.find(CELL)
    rows.add(row(null, ms_of_rounds=[80.0, 90.0]), {}, "new")
    peer = replace(CELL, contestant="dense paged", routing="-")
    rows.add(row(peer, ms_of_rounds=[210.0]), {}, "new")
    rows.add(row(replace(peer, contestant="dense adamw"), device_gib=30.0), {}, "new")
    rows.add(row(replace(peer, contestant="qlora", base="nf4", r=64), ms_of_rounds=[50.0]), {}, "new")
    rows.compare("new")
    found = Rows(rows.path).find(CELL)
    assert found["of_null"] == pytest.approx((0.8 + 0.75) / 2)
    assert found["times_peers"] == {"dense paged": 2.1, "qlora": 0.5}


def test_a_rerun_measures_what_is_missing_and_what_it_is_compared_with(tmp_path):
    group = plan.quick_plan().__next__()
    rows = Rows(tmp_path / "rows.json")
    for cell in group.cells:
        rows.add(row(cell), {}, "a")
    assert not bench.chosen(group, rows, "", False, set()).cells
    assert bench.chosen(group, rows, "", True, set()) == group
    rows.add(row(replace(CELL, contestant="meft stream"), status="error: x"), {}, "a")
    found = bench.chosen(group, rows, "", False, set()).cells
    assert [(c.contestant, c.routing) for c in found] == [("meft stream", "0.26"), ("null", "0.26")]
    assert len(bench.chosen(group, rows, "", False, {replace(CELL, contestant="null")}).cells) == 1
    peer = next(cell for cell in group.cells if cell.contestant == "dense paged")
    rows.add(row(peer, status="error: x"), {}, "a")
    found = bench.chosen(group, rows, "paged", False, set()).cells
    assert [(c.contestant, c.routing) for c in found] == [
        ("dense paged", "-"), ("meft auto", "0.26"), ("null", "0.26")
    ]  # fmt: skip


def verdict(rows, name):
    return next(target for target in targets(rows) if name in target.name).verdict


def test_targets():
    assert {target.verdict for target in targets([])} == {OPEN}
    lean = [
        row(replace(CELL, contestant=f"meft {name}"), peak_gib=peak)
        for name, peak in (("host", 15.0), ("stream", 15.5))
    ]
    assert verdict(lean, "|U| = 0.26 r") == MET
    assert verdict(lean, "|U| = 0.6 r") == OPEN
    assert verdict([lean[0], row(replace(CELL, contestant="meft stream"), peak_gib=15.6)], "|U| = 0.26 r") == MISSED
    assert verdict([lean[0], row(replace(CELL, contestant="meft stream"), status="OOM")], "|U| = 0.26 r") == OPEN
    assert verdict([row(of_null=0.79)], "without transport") == MISSED
    assert verdict([row(of_null=0.81)], "without transport") == MET
    assert verdict([row(of_null=0.81), row(of_null=0.5, bound_of_null=0.6)], "without transport") == MET
    ways = {"bytes_to_device": 100, "formula_to_device": 100, "bytes_to_host": 102, "formula_to_host": 100}
    assert verdict([row(**ways)], "traffic") == MISSED
    assert verdict([row(**ways | {"bytes_to_host": 101})], "traffic") == MET
    omega = {"elements_to_device": 40, "elements_to_host": 16, "row_values": 100}
    small = replace(CELL, contestant="meft host", r=6144)
    assert verdict([row(small, **omega)], "r 6144") == MET
    assert verdict([row(small, **omega | {"elements_to_host": 17})], "r 6144") == MISSED
    assert verdict([row(times_peers={"dense paged": 1.5, "dense torchao": 0.9, "lora": 0.5})], "peer") == MISSED
    assert verdict([row(times_peers={"dense paged": 1.5, "lora": 0.5})], "peer") == MET
    assert verdict([row(bound_ms=100.0)], "bound") == MET


def test_flatness_leaves_out_what_has_to_grow():
    cells = [replace(CELL, contestant="meft host", routing="rows:1024", r=r) for r in plan.FLAT_R]
    rows = [row(cell, peak_gib=10 + cell.r / 1e4, growing_gib=cell.r / 1e4) for cell in cells]
    assert verdict(rows, "meft host: growth") == MET
    assert verdict(rows[:-1], "meft host: growth") == OPEN
    assert verdict([*rows[:-1], rows[-1] | {"peak_gib": 13.0}], "meft host: growth") == MISSED


def test_environment_says_whether_the_row_update_is_native():
    assert environment(CPU)["native_row_update"] in (True, False)
    assert environment(CPU)["torch"] == torch.__version__


def test_a_worker_process_measures_and_traces(tmp_path):
    """As on a GPU, but on the CPU: a process of its own, a row with times, a profile of a step."""
    cell = plan.Cell("tiny-llama", "bf16", 2, 16, 1, True, 64, "meft stream", "0.26")
    some = work.Settings(rounds=1, seconds=0, fewest=1, most=1, trace=str(tmp_path))
    rows = []
    bench.run_apart(bench.Job((cell,), some, 300), lambda _, row: rows.append(row), time.perf_counter() + 300)
    assert [row["status"] for row in rows] == ["measured"]
    assert rows[0]["tokens_per_s"] > 0
    assert rows[0]["host_gib"] > 0
    assert [path.name for path in tmp_path.iterdir()] == [
        "24gb_trace_tiny_llama_bf16_2x16_x1_clip_r_64_meft_stream_0.26.json.gz"
    ]


# -------------------------------------------------------------------------------------------------------------- bound


def test_a_row_is_held_against_the_model_of_a_step():
    """The same number as `benchmarks.step_bound` predicts, from what a row says."""
    at = ceilings("3090")
    config = MEFTConfig(r=6400, row_dtype="bfloat16")
    said = {"strategy": "stream", "union_share": 0.26, "stepped_share": 0.26, "refetch": False}
    predicted = model_24gb.cell("3090", 6400, (2, 256), 0.26, 1, True)["seconds at least"]["stream"]
    base = models.config_of("llama-2-7b")
    assert bound.bound_of(at, CELL, base, config, said).seconds == pytest.approx(predicted, rel=1e-3)
    assert bound.bound_of(at, CELL, base, config, said | {"stepped_share": None}) is None
    slow = replace(at, to_device=2e9)
    kept, again = (bound.bound_of(slow, CELL, base, config, said | {"refetch": r}).seconds for r in (False, True))
    assert again > kept
