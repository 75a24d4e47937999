"""The kernel benchmark's own logic: a rehearsal from end to end, its gates, forced shares, files and verdicts."""

import csv
import importlib
import subprocess
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.kernel_bench import __main__ as bench
from benchmarks.kernel_bench import cases_adamw, inputs, report, run, targets, timing

ROOT = Path(__file__).resolve().parents[2]

TIMES = ("ms_q20", "ms_q50", "ms_q80", "rate", "of_ceiling", "times_ours")
# Each op of the package, and the benchmark's ops that use it.
USERS = {
    "gather_rows": ("gather_rows", "scatter_rows"),
    "scatter_rows": ("scatter_rows",),
    "router_topk": ("router_topk", "router_topk + row_union"),
    "row_union": ("row_union",),
    "row_union_window": ("row_union", "router_topk + row_union"),
    "expert_topk": ("expert_topk",),
    "sparse_ffn": ("sparse_ffn",),
    "row_adamw": ("row_adamw",),
}


@pytest.fixture(autouse=True)
def compiled(monkeypatch, one_thread):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The files of one whole rehearsal, and its rows."""
    out = tmp_path_factory.mktemp("rehearsal") / "new"
    assert bench.main(["--rehearse", "--out", str(out)]) == 0
    with (out / "rehearsal_kernels_cpu.csv").open() as file:
        return out, list(csv.DictReader(file))


@pytest.fixture
def machine():
    """A CPU for toy shapes, with made-up ceilings."""
    found = bench.prepare(True, None)
    ways = ("pinned copy in", "pinned copy out", "pinned copies at once", "device copy", "GEMM")
    found.ceilings = dict.fromkeys(ways, 1e9)
    return found


def run_op(machine, op, seconds=600.0):
    make_plan, gate, _ = bench.OPS[op]
    return run.run_op(machine, op, make_plan, gate, time.perf_counter() + seconds)


def spoil(monkeypatch, name, change):
    """Put a wrong op into its module."""
    module = importlib.import_module(f"adapter_kernels.{inputs.MODULES[name]}")
    op = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **settings: change(op, args, settings))


def test_a_rehearsal_runs_every_op_and_its_files_cannot_be_taken_for_a_measurement(rehearsal):
    out, rows = rehearsal
    assert tuple(rows[0]) == report.COLUMNS
    assert {row["op"] for row in rows} == {"ceiling", run.BESIDE, *bench.OPS}
    assert {row["rehearsal"] for row in rows} == {report.REHEARSAL}
    assert {row["gpu"] for row in rows} == {"none"}
    assert {row["status"] for row in rows if row["op"] != run.BESIDE} == {"rehearsed"}
    assert all(row["status"].startswith("missing: two streams") for row in rows if row["op"] == run.BESIDE)
    assert all(path.name.startswith("rehearsal_") for path in out.iterdir())
    text = (out / "rehearsal_kernels_cpu.txt").read_text()
    assert text.startswith(report.REHEARSAL)
    assert "No target is judged" in text
    assert " ms" not in text
    assert (out / "rehearsal_kernels_cpu.png").exists() == bool(report.installed("matplotlib"))


def test_rehearsed_rows_say_all_that_is_asked(rehearsal):
    _, rows = rehearsal
    timed = [row for row in rows if row["status"] == "rehearsed"]
    for row in timed:
        assert 0 < float(row["ms_q20"]) <= float(row["ms_q50"]) <= float(row["ms_q80"])
        assert row["torch"] == torch.__version__
    toy = bench.TOY
    forced = {(int(row["r"]), float(row["share"]), int(row["U"])) for row in timed if row["share"]}
    assert forced == {(r, share, round(r * share)) for r, _ in toy.sizes for share in toy.shares}
    layers = {
        (int(row["r"]), int(row["T"]), float(row["share"])) for row in timed if row["op"] == "sparse_ffn" and row["U"]
    }
    assert layers == set(toy.layers())
    named = {(row["op"], row["contestant"]) for row in timed}
    assert named >= {
        ("gather_rows", "host index_select, one copy"), ("gather_rows", "one copy a row"),
        ("scatter_rows", "device index_select, one D2H copy"), ("sparse_ffn", "torch, mask and ReLU apart"),
        ("sparse_ffn", "the bare GEMMs"), ("sparse_ffn", "dense adapter of all r"),
        ("expert_topk", "GEMM over all keys, masked top-k"), ("router_topk", "torch.topk"),
        ("router_topk", "torch.sort"), ("row_adamw", "fused AdamW, contiguous rows"),
    }  # fmt: skip
    assert all(row["of_ceiling"] == "" for row in timed if row["contestant"] == "dense adapter of all r")


@pytest.mark.parametrize("out", [[], ["--out", str(bench.RESULTS)], ["--out", str(bench.RESULTS / "new")]])
def test_a_rehearsal_never_writes_to_the_results(out, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--rehearse", *out])
    assert "a rehearsal needs --out" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it measures")
def test_without_a_gpu_one_sentence_and_nothing_written(tmp_path, capsys):
    assert bench.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().out.count("\n") == 1
    assert not list(tmp_path.iterdir())


def wrong(op, args, settings):
    """Its result a little off where that is a float, and one place off where it is not; in place where it is."""
    before = [x.clone() for x in args if isinstance(x, torch.Tensor)]
    result = op(*args, **settings)
    if result is None:
        table = args[2][0] if isinstance(args[2], list) else getattr(args[0], "table", args[0])
        table[:] = table * 1.05 if before else table
        return None
    tensors = list(result) if isinstance(result, tuple | list) else [result]
    spoilt = [x * 1.05 if x.is_floating_point() else x.roll(1, -1) for x in tensors]
    return type(result)(spoilt) if isinstance(result, tuple | list) else spoilt[0]


@pytest.mark.parametrize(("name", "op"), [(name, op) for name, ops in USERS.items() for op in ops])
def test_a_wrong_op_gets_no_time(monkeypatch, machine, name, op):
    spoil(monkeypatch, name, wrong)
    rows = run_op(machine, op)
    ours = {"row_union": "ours, window of fixed size"}.get(op, inputs.OURS)
    if (name, op) == ("row_union", "row_union"):
        ours = "ours, exact size"
    failed = [row for row in rows if row["contestant"] in (ours, inputs.OURS)]
    assert failed
    for row in failed:
        assert row["status"].startswith("wrong"), row
        assert not set(TIMES) & row.keys()
        assert "ms" not in bench.line(row, False).split(": ")[-1].split()
    if ours == inputs.OURS:
        assert all(row["status"].startswith(("wrong", "not run")) for row in rows)


def test_what_is_wrong_only_past_the_gate_gets_no_time_either(monkeypatch, machine):
    """The gate has 5 rows; the cases have more."""

    def wrong_when_long(op, args, settings):
        result = op(*args, **settings)
        if len(args[0]) > 10:
            result[0][10] += 1
        return result

    spoil(monkeypatch, "gather_rows", wrong_when_long)
    rows = run_op(machine, "gather_rows")
    assert {row["status"].split(":")[0] for row in rows} == {"wrong", "not run"}


def test_a_wrong_peer_alone_has_no_time(monkeypatch, machine):
    monkeypatch.setattr(cases_adamw, "fused_step", lambda rows, grads: lambda: rows)
    rows = run_op(machine, "row_adamw")
    assert {row["contestant"] for row in rows if row["status"] != run.OK} == {cases_adamw.FUSED}


def test_a_missing_op_is_a_row(monkeypatch, machine):
    monkeypatch.delattr(importlib.import_module("adapter_kernels.ffn.sparse_ffn"), "sparse_ffn")
    (row,) = run_op(machine, "sparse_ffn")
    assert row["status"].startswith("missing: sparse_ffn")
    assert run_op(machine, "router_topk")[0]["status"] == run.OK


def test_an_error_is_a_row(monkeypatch, machine):
    def fail(op, args, settings):
        raise RuntimeError("CUDA error: out of memory\nmore lines")

    spoil(monkeypatch, "row_adamw", fail)
    rows = [row for row in run_op(machine, "row_adamw") if row["contestant"] == inputs.OURS]
    assert {row["status"] for row in rows} == {"error: RuntimeError: CUDA error: out of memory"}


def test_what_does_not_fit_into_the_time_is_named(machine):
    rows = run_op(machine, "row_union", seconds=-1.0)
    assert len(rows) == len(bench.TOY.layers())
    assert {row["status"] for row in rows} == {"not run: out of time"}
    assert "r 80, T 20, share 0.26, U 21" in bench.line(rows[0], False)


def test_full_shapes_are_those_of_the_targets():
    full = bench.FULL
    assert full.d == 4096
    assert full.sizes == ((4096, 256), (6400, 320), (8464, 368))
    assert full.tokens == (256, 512, 1024, 2048)
    assert full.shares == (0.1, 0.26, 0.6, 1.0)
    assert full.copied == 64 << 20
    assert full.layers()[0] == full.main
    assert len(full.layers()) == 48


@pytest.mark.parametrize("r", [r for r, _ in bench.FULL.sizes])
@pytest.mark.parametrize("share", bench.FULL.shares)
def test_shares_are_exact_at_full_size(r, share):
    U = inputs.union_size(r, share)
    picks = inputs.forced_picks(256, 64, r, U, torch.Generator().manual_seed(0))
    assert len(picks.unique()) == U
    ordered = picks.sort(dim=1).values
    assert bool((ordered[:, 1:] > ordered[:, :-1]).all())


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 60), st.data())
def test_shares_are_exact_at_any_size(T, K, r, data):
    U = data.draw(st.integers(1, r))
    generator = torch.Generator().manual_seed(0)
    if not K <= U <= T * K:
        with pytest.raises(ValueError, match="U: "):
            inputs.forced_picks(T, K, r, U, generator)
        return
    picks = inputs.forced_picks(T, K, r, U, generator)
    assert picks.shape == (T, K)
    assert len(picks.unique()) == U
    assert all(len(row.unique()) == K for row in picks)
    assert 0 <= int(picks.min()) <= int(picks.max()) < r


@pytest.mark.parametrize(
    ("values", "limit", "settings", "verdict"),
    [
        ((0.95, 0.9), 0.9, {}, targets.REACHED),
        ((0.95, 0.89), 0.9, {}, targets.MISSED),
        ((0.95,), 0.9, {"lacking": 1}, targets.OPEN),
        ((0.89,), 0.9, {"lacking": 1}, targets.MISSED),
        ((), 0.9, {}, targets.OPEN),
        ((0.95,), None, {}, targets.OPEN),
        ((39.0, 40.0), 40.0, {"at_least": False}, targets.REACHED),
        ((39.0, 40.1), 40.0, {"at_least": False}, targets.MISSED),
        ((1.1,), 1.1, {"at_least": False, "strict": True}, targets.MISSED),
        ((1.09,), 1.1, {"at_least": False, "strict": True}, targets.REACHED),
        ((float("nan"),), 0.9, {}, targets.MISSED),
    ],
)
def test_verdicts(values, limit, settings, verdict):
    target = targets.Target("x", values, limit, **settings)
    assert target.verdict == verdict
    assert target.line().startswith(verdict)


def row(op, contestant=inputs.OURS, what="", status=run.OK, **fields):
    return {"op": op, "contestant": contestant, "what": what, "status": status, "dtype": "bfloat16"} | fields


def test_targets_take_the_worst_of_the_rows_that_they_are_about():
    gather = {"op": "gather_rows", "what": "pinned table", "r": 6400}
    rows = [
        row(**gather, U=640, of_ceiling=0.5),  # too few rows to count
        row(**gather, U=1664, of_ceiling=0.95),
        row(**gather, U=3840, of_ceiling=0.92),
        row("gather_rows", what="device table", U=6400, of_ceiling=0.1),
        row("sparse_ffn", "torch, mask and ReLU apart", "forward", T=512, U=1664, times_ours=1.3),
        row("sparse_ffn", "torch, mask and ReLU apart", "backward", T=512, U=1664, times_ours=1.1),
        row("sparse_ffn", what="forward", T=256, U=1664, status="wrong: y"),
        row("sparse_ffn", "the bare GEMMs", "forward", T=512, U=1664, times_ours=0.7),
        row("router_topk + row_union", T=512, ms_q50=0.05),
        row("router_topk + row_union", T=2048, ms_q50=0.5),
        row("expert_topk", status="missing: expert_topk"),
    ]
    found = {target.name: target for target in targets.targets(rows, "NVIDIA H200", 90)}
    by_words = lambda *words: next(t for name, t in found.items() if all(word in name for word in words))  # noqa: E731
    assert by_words("8 KiB").values == (0.95, 0.92)
    assert by_words("8 KiB").verdict == targets.REACHED
    assert by_words("sparse_ffn, times").verdict == targets.OPEN  # the wrong case might have been slower
    assert by_words("bare GEMMs").limit == 0.65
    assert by_words("router_topk").values == (50.0,)
    assert by_words("router_topk").verdict == targets.MISSED
    assert by_words("expert_topk").verdict == targets.OPEN
    assert targets.rate_limit(86) == 0.85
    assert targets.rate_limit(120) is None
    assert targets.routing_limit("NVIDIA GeForce RTX 4090") == 80.0
    assert targets.routing_limit("NVIDIA A100") is None


def test_where_a_rival_is_faster_it_is_named():
    rows = [
        row("sparse_ffn", "torch, mask and ReLU apart", "forward", T=512, U=1664, times_ours=0.9),
        row("sparse_ffn", "torch, mask and ReLU apart", "backward", T=512, U=1664, times_ours=1.1),
        row("sparse_ffn", "the bare GEMMs", "forward", T=512, U=1664, times_ours=0.7),
    ]
    (line,) = targets.choices(rows)
    assert "forward (T 512, U 1664), 0.90 of its time" in line


def test_files_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "kernels.csv"
    report.replace(path, b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(report.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report.replace(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["kernels.csv"]


def test_files_are_named_after_the_gpu():
    assert report.stem({"rehearsal": "no", "gpu": "NVIDIA GeForce RTX 4090"}) == "kernels_nvidia-geforce-rtx-4090"


def test_only_calls_while_both_streams_were_busy_count():
    spans = [(0, 0.0, 2.0), (0, 2.0, 4.0), (0, 4.0, 7.0), (1, 1.0, 2.0), (1, 2.0, 5.0), (1, 5.0, 9.0)]
    assert timing.while_both_ran(spans) == ([2.0, 3.0], [1.0, 3.0])


def test_the_target_is_in_the_list():
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "bench-kernels" in listed
