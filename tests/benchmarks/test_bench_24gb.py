"""The 24 GB benchmark: a dry run from end to end, the check before any speed, and workers that fail."""

import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from benchmarks.card_24gb import __main__ as bench
from benchmarks.card_24gb import gate, models, plan, routing, steps
from benchmarks.card_24gb import worker as work
from benchmarks.card_24gb.contestants import missing
from meft.table.row_table import RowTable

CELL = plan.Cell("llama-2-7b", "bf16", 2, 256, 1, True, 6400, "meft auto", "0.26")
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


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
        absent = missing(plan.Cell(**{name: row[name] for name in CELL.key}))
        unfit = row["contestant"] == "dense torchao" and row["status"].startswith("not on a CPU")
        assert row["status"] == (absent or work.DRY) or unfit, row


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


def test_without_the_gate_rows_say_so(monkeypatch):
    rows, _ = run_worker(monkeypatch, [CELL], check=lambda *_: 1 / 0, gate=False)
    assert (rows[CELL]["status"], rows[CELL]["gate"]) == ("measured", False)
    assert bench.said({**rows[CELL], "peak_gib": 1.0}).endswith("not checked here")
    assert "zero copy refused" in bench.said({**rows[CELL], "peak_gib": 1.0, "zero_copy_refused": True})
    assert run_worker(monkeypatch, [CELL])[0][CELL]["gate"]


# ------------------------------------------------------------------------------------------------------------- workers


def test_rows_that_many_generators_draw_are_the_same_each_time():
    def drawn():
        table = RowTable((600, 64), master=torch.float32, compute_dtype=torch.bfloat16, on_host=True, pin=False)
        with models.filled_by_many():
            table.fill(0.02)
        return table.rows.detach()

    rows = drawn()
    assert torch.equal(rows, drawn())
    assert abs(rows.std() - 0.02) < 1e-3
    assert not torch.equal(rows[:256], rows[256:512])


def test_an_absent_peer_takes_no_process(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(bench, "environment", lambda device: {"gpu": "none"})
    started = []
    monkeypatch.setattr(bench, "run_apart", lambda job, *_: started.extend(job.cells))
    bench.main(["--quick", "--only", "torchao|paged|qlora", "--out", str(tmp_path)])
    assert {cell.family for cell in started} == {"meft"}  # what they would be compared with
    assert capsys.readouterr().out.count("not installed: ") == 3


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


def run_worker(monkeypatch, cells, block=None, check=lambda *_: None, rounds=1, turn=0, gate=True):
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

    work.Worker(work.Job(tuple(cells), work.Settings(rounds=rounds), 60, turn, gate=gate), CPU, emit).run()
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


def test_a_worker_that_cannot_clean_up_ends(monkeypatch):
    """The parent starts another one for the cells without a row."""
    cells = [replace(CELL, routing=share) for share in ("1.0", "0.26")]

    def block(cell):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Fake, "leave", lambda self: 1 / 0)
    rows, order = run_worker(monkeypatch, cells, block)
    assert (list(rows), len(order)) == (cells[:1], 1)


def test_a_package_that_is_missing_is_a_row(monkeypatch):
    cell = replace(CELL, contestant="dense torchao", routing="-")
    found = []
    monkeypatch.setattr(work, "make", lambda *_: models.require("no_such_package"))
    work.Worker(work.Job((cell,), work.Settings(), 60), CPU, lambda kind, row: found.append((kind, row))).run()
    assert [row["status"] for kind, row in found if kind == "row"] == ["not installed: no_such_package"]


def test_a_failure_tells_its_kind():
    assert work.failure(torch.OutOfMemoryError("x")) == "OOM"
    assert work.failure(MemoryError("r=16384 takes more")) == "OOM on the host"
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
    job = work.Job((CELL, replace(CELL, clip=False)), work.Settings(rounds=3), 12.5, 4, True, gate=False)
    job.write(tmp_path / "job.json")
    assert work.Job.read(tmp_path / "job.json") == job
