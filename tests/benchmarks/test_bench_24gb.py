"""The 24 GB benchmark's own logic: a dry run from end to end, forced routing, workers that fail, files and verdicts."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_24gb as bench  # noqa: E402
import engine_24gb_bound as bound  # noqa: E402
import engine_24gb_gate as gate  # noqa: E402
import engine_24gb_models as models  # noqa: E402
import engine_24gb_plan as plan  # noqa: E402
import engine_24gb_routing as routing  # noqa: E402
import engine_24gb_steps as steps  # noqa: E402
import engine_24gb_worker as work  # noqa: E402
import model_24gb  # noqa: E402
import record_routing as record  # noqa: E402
from engine_24gb_rows import Rows, environment  # noqa: E402
from engine_24gb_targets import MET, MISSED, OPEN, targets  # noqa: E402
from engine_24gb_traffic import expected_bytes  # noqa: E402

import meft.strategies  # noqa: E402
from aslora_meft.planner.rates import ceilings  # noqa: E402
from meft import MEFTConfig  # noqa: E402

CELL = plan.Cell("llama-2-7b", "bf16", 2, 256, 1, True, 6400, "meft auto", "0.26")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------- a dry run


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The folder of one whole dry run, its rows, and what lay in the results before and after."""
    out = tmp_path_factory.mktemp("dry") / "new"
    results = {path: path.stat().st_mtime_ns for path in bench.RESULTS.iterdir()}
    assert bench.main(["--dry-run", "--out", str(out)]) == 0
    assert results == {path: path.stat().st_mtime_ns for path in bench.RESULTS.iterdir()}
    return out, json.loads((out / "dry_run_24gb.json").read_text())["rows"]


def test_every_contestant_runs(dry):
    _, rows = dry
    planned = [cell for group in plan.dry_plan() for cell in group.cells]
    assert {plan.Cell(**{name: row[name] for name in CELL.key}) for row in rows} == set(planned)
    for row in rows:
        missing = row["contestant"] == "dense torchao" and row["status"] == "not installed: torchao"
        assert row["status"] == work.DRY or missing, row


def test_counters_are_the_formula(dry):
    counted = [row for row in dry[1] if row.get("bytes_to_device") is not None]
    assert len(counted) >= 20
    for row in counted:
        assert row["bytes_to_device"] == row["formula_to_device"], row
        assert row["bytes_to_host"] == row["formula_to_host"], row
        if row["routing"] != "recorded":
            assert round(row["union_share"] * row["r"]) == routing.Routing(row["routing"]).size(row["r"])


def test_nothing_is_measured(dry):
    out, rows = dry
    for name in ("tokens_per_s", "ms_q50", "stall_ms", "peak_gib", "device_gib", "host_gib"):
        assert all(row.get(name) is None for row in rows)
    text = (out / "dry_run_24gb.md").read_text()
    assert "DRY RUN" in text
    lines = [line for line in text.splitlines() if line.startswith(("| meft stream", "| dense", "| qlora"))]
    assert all(line.count("not measured") >= 7 for line in lines)
    judged = text.split("## Targets")[1].split("##")[0].strip().splitlines()
    assert len(judged) >= 9
    assert all("not measured" in line for line in judged)
    assert (out / "dry_run_24gb.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments",
    [["--dry-run"], ["--dry-run", "--out", str(bench.RESULTS / "dry")], ["--minutes", "10"]],
)
def test_arguments_that_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert "must" in capsys.readouterr().err or "--dry-run" in arguments


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert bench.main(["--out", str(tmp_path)]) == 2
    assert "No CUDA device" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------ routing


@settings(max_examples=60, deadline=None)
@given(
    T=st.integers(1, 60), K=st.integers(1, 16), r=st.integers(1, 300), part=st.floats(0.001, 1), seed=st.integers(0, 9)
)
def test_forced_ids(T, K, r, part, seed):
    """Exactly the subset, distinct within a token, the same each time."""
    size = max(1, round(part * r))
    ids = routing.forced_ids(T, K, r, size, seed)
    assert ids.shape == (T, K)
    assert torch.equal(ids, routing.forced_ids(T, K, r, size, seed))
    used = ids[ids >= 0]
    assert int(used.max()) < r
    assert all(len(set(row)) == min(K, size) for row in (line[line >= 0].tolist() for line in ids))
    assert len(used.unique()) == min(size, T * min(K, size))


@pytest.mark.parametrize("size", [0, 11])
def test_a_subset_that_is_none(size):
    with pytest.raises(ValueError, match="size"):
        routing.forced_ids(4, 2, 10, size, 0)


def test_own_picks_are_made_and_replaced(monkeypatch):
    asked = []

    def original(x, *_):
        asked.append(len(x))
        return torch.zeros(len(x), 2, dtype=torch.int32)

    monkeypatch.setattr(meft.strategies, "picked_neurons", original)
    ids = routing.Routing("0.5").ids(8, 3, 1, 4)
    with routing.forced_picks(ids, routing.SUBSETS, 4, 2):
        found = [
            meft.strategies.picked_neurons(torch.zeros(4, 1), None, None, None) for _ in range(routing.SUBSETS + 1)
        ]
    assert asked == [4] * (routing.SUBSETS + 1)
    assert all(len(some.unique()) == 4 for some in found)
    assert torch.equal(found[0], found[-1])
    assert not all(torch.equal(found[0], some) for some in found)
    assert meft.strategies.picked_neurons is original


def test_other_tokens_than_announced_are_refused():
    with pytest.raises(ValueError, match="and not for 5"):
        routing.Routing("0.5").ids(8, 3, 1, 4)(0, 5, 2)


@pytest.fixture(scope="module")
def recorded():
    return routing.Recorded.read()


def test_recording_is_small_and_whole(recorded):
    assert routing.RECORD.stat().st_size < 300_000
    assert recorded.counts.shape == (30, 6400)
    assert (recorded.counts[:, :-1] >= recorded.counts[:, 1:]).all()
    assert {f"{b}x{n}" for b, n in plan.SHAPES} <= recorded.about["union_share"].keys()
    picks = recorded.about["picks_a_token"]
    total = recorded.counts.sum(1) / recorded.about["recorded_tokens"]
    assert total == pytest.approx(picks, abs=0.01)


@pytest.mark.parametrize("layer", [0, 29])
def test_draws_use_as_many_neurons_as_the_recording(recorded, layer):
    ids = routing.drawn_ids(recorded, layer, 2, 256, 64, 6400, seed=3)
    assert torch.equal(ids, routing.drawn_ids(recorded, layer, 2, 256, 64, 6400, seed=3))
    assert all(len(set(row.tolist())) == 64 for row in ids)
    assert len(ids.unique()) / 6400 == pytest.approx(recorded.share(layer, 2, 256), rel=0.1)
    smaller = routing.drawn_ids(recorded, layer, 2, 256, 64, 3072, seed=3)
    assert int(smaller.max()) < 3072


def test_inclusion_adds_up(recorded):
    weights = recorded.weights(5, 6400)
    assert routing.inclusion(weights, 64).sum() == pytest.approx(64)
    assert routing.inclusion(weights[:10], 64).sum() == 10


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
    small = {"host": 4 * 1664 + 4 * 512 * 64 + 4 * 512 * 320}.get(strategy, 4 * 1664)
    assert sum(ways) == 32 * (2 * 4096 * elements + small)
    again = expected_bytes(
        strategy, CELL, d=4096, layers=32, experts=320, top_k=64, union=1664, stepped=1664 / 6400, refetch=True
    )
    brought = {"device-keys": 1, "device-rows": 0}.get(strategy, 2)
    assert again == (ways[0] + 32 * 2 * 4096 * brought * 1664, ways[1])
    assert expected_bytes("resident", CELL, d=1, layers=1, experts=1, top_k=1, union=1, stepped=None) == (0, 0)
    assert expected_bytes(None, CELL, d=1, layers=1, experts=1, top_k=1, union=1, stepped=None) is None


# ----------------------------------------------------------------------------------------------------------- the gate


def test_gate_tells_wrong_from_right():
    rows, before = [torch.ones(3, 2)], [torch.zeros(3, 2)]
    gate.compare([1.0], before, rows, [1.0], rows, 1e-4)
    for losses, found in (
        ([1.01], rows), ([float("nan")], rows), ([1.0], [rows[0] + 1e-3]), ([1.0], [rows[0] * float("nan")]),
    ):  # fmt: skip
        with pytest.raises(gate.WrongError):
            gate.compare([1.0], before, rows, losses, found, 1e-4)
    with pytest.raises(gate.WrongError):  # nothing was trained
        gate.compare([1.0], rows, rows, [1.0], rows, 1e-4)


def test_a_strategy_that_is_wrong_is_not_timed(monkeypatch):
    def wrong(name, device):
        if name == "meft stream":
            raise gate.WrongError("loss 2 in place of 1")

    job = [replace(CELL, contestant=name) for name in ("meft stream", "null")]
    rows, order = run_worker(monkeypatch, job, check=wrong)
    assert order == ["null"]
    assert rows[job[0]]["status"] == "wrong: loss 2 in place of 1"


# ------------------------------------------------------------------------------------------------------------- workers


class Fake(work.Contestant):
    """A contestant that only says that it was called."""

    def __init__(self):
        self.order, self.left = [], 0

    def enter(self, name):
        self.name = name

    def leave(self):
        self.left += 1

    def values(self):
        return 1


def run_worker(monkeypatch, cells, block=None, check=lambda *_: None, rounds=1, turn=0):
    """Rows by cell, and the contestants in the order in which they were measured."""
    fake, rows = Fake(), {}

    def measured(owner, cell, *_, **__):
        owner.order.append(owner.name)
        if block:
            block(cell)
        nan = float("nan")
        return steps.Block([2.0, 1.0, 3.0], 0.0, 0.0, nan, nan, nan, nan, {"loss": 1.0})

    monkeypatch.setattr(work, "make", lambda cell, device: fake)
    monkeypatch.setattr(work, "measure_block", measured)
    monkeypatch.setattr(work, "check_strategy", check)

    def emit(kind, content):
        if kind == "row":
            rows[plan.Cell(**{name: content[name] for name in CELL.key})] = content

    work.Worker(work.Job(tuple(cells), work.Settings(rounds=rounds), 60, turn), CPU, emit).run()
    return rows, fake.order


def test_order_rotates_and_the_yardstick_leads(monkeypatch):
    cells = [replace(CELL, contestant=name) for name in ("meft host", "meft stream", "null")]
    rows, order = run_worker(monkeypatch, cells, rounds=3)
    assert order == ["null", "meft host", "meft stream"] + ["meft stream", "null", "meft host"] + [
        "null", "meft host", "meft stream"
    ]  # fmt: skip
    row = rows[cells[0]]
    assert (row["rounds"], row["ms_q50"], row["steps"]) == (3, 2.0, 9)
    assert row["tokens_per_s"] == pytest.approx(1e3 * 512 / 2.0)


def test_out_of_memory_is_a_row(monkeypatch):
    cells = [replace(CELL, routing=share) for share in ("0.26", "1.0", "0.1")]

    def block(cell):
        if cell.routing == "1.0":
            raise torch.OutOfMemoryError("CUDA out of memory")

    rows, order = run_worker(monkeypatch, cells, block, rounds=2)
    assert [rows[cell]["status"] for cell in cells] == ["measured", "OOM", "measured"]
    assert len(order) == 5  # what has failed is not tried again


def test_a_package_that_is_missing_is_a_row(monkeypatch):
    cell = replace(CELL, contestant="dense torchao", routing="-")
    found = []
    monkeypatch.setattr(work, "make", lambda *_: models.require("no_such_package"))
    work.Worker(work.Job((cell,), work.Settings(), 60), CPU, lambda kind, row: found.append((kind, row))).run()
    assert [row["status"] for kind, row in found if kind == "row"] == ["not installed: no_such_package"]


def test_a_failure_tells_its_kind():
    assert work.failure(torch.OutOfMemoryError("x")) == "OOM"
    assert work.failure(RuntimeError("first\nsecond")) == "error: RuntimeError: first"


STUB = """
import json, sys
held = json.load(open(sys.argv[1]))
for key in held["cells"]:
    print("@begin", json.dumps(key), flush=True)
    if key["routing"] == "1.0":
        {last}
    print("a warning")
    print("@row", json.dumps(dict(key, status="measured")), flush=True)
"""


def stub(last):
    """A process in the place of a worker."""
    return lambda path: subprocess.Popen(
        [sys.executable, "-c", STUB.format(last=last), str(path)], stdout=subprocess.PIPE, text=True
    )


def test_a_worker_that_dies_costs_one_cell(capsys):
    cells = tuple(replace(CELL, routing=share) for share in ("0.26", "1.0", "0.1"))
    rows = []
    job = bench.Job(cells, bench.Settings(), 60)
    bench.run_apart(job, lambda _, row: rows.append(row), time.perf_counter() + 60, stub("sys.exit(9)"))
    assert [(row["routing"], row["status"]) for row in rows] == [
        ("0.26", "measured"), ("1.0", "error: the worker ended with code 9"), ("0.1", "measured"),
    ]  # fmt: skip
    assert capsys.readouterr().out == "a warning\n" * 2


def test_a_worker_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(bench, "FEWEST_S", 0.5)
    monkeypatch.setattr(bench, "GRACE_S", 0.0)
    rows = []
    job = bench.Job((replace(CELL, routing="1.0"),), bench.Settings(), 60)
    last = "import time; time.sleep(60)"
    bench.run_apart(job, lambda _, row: rows.append(row), time.perf_counter() + 1.5, stub(last))
    assert [row["status"] for row in rows] == ["error: the worker was late and was ended"]


def test_a_worker_that_does_not_start_is_not_tried_for_ever():
    job = bench.Job((CELL,), bench.Settings(), 60)
    start = lambda path: subprocess.Popen([sys.executable, "-c", "1/0"], stdout=subprocess.PIPE, text=True)  # noqa: E731
    bench.run_apart(job, lambda *_: pytest.fail("no row"), time.perf_counter() + 60, start)


def test_a_job_goes_through_its_file(tmp_path):
    job = work.Job((CELL, replace(CELL, clip=False)), work.Settings(rounds=3), 12.5, 4, True)
    job.write(tmp_path / "job.json")
    assert work.Job.read(tmp_path / "job.json") == job


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


# ---------------------------------------------------------------------------------------------------------- recording


def test_recording_counts_what_a_model_picks(monkeypatch):
    monkeypatch.setattr(record, "SHAPES", ((1, 8), (2, 8)))
    torch.manual_seed(0)
    base = models.frozen_model("tiny-llama", "bf16", CPU, torch.float32)
    model = get_peft_model(base, MEFTConfig(r=64, top_k=4, experts_per_token=4, task_type="CAUSAL_LM"))
    ids = torch.randint(128, (64,))
    losses = record.train(model, record.batches(ids, 2, 8), 3, 1e-2)
    assert len(losses) == 3
    counter, shares = record.record(model, ids, 64, 2)
    assert counter.tokens == 2 * 8 + 2 * 16
    assert (counter.counts.sum(1) == counter.picks).all()
    assert (counter.picks <= 4 * counter.tokens).all()
    assert counter.picks.min() > 0
    assert {name: len(of) for name, of in shares.items()} == {"1x8": 4, "2x8": 4}
    assert all(0 < share <= 1 for of in shares.values() for share in of)


# -------------------------------------------------------------------------------------------------------------- bound


def test_a_row_is_held_against_the_model_of_a_step():
    """The same number as `model_24gb.py` predicts, from what a row says."""
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
