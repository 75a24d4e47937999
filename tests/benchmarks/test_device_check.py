"""The device check: a rehearsal from end to end, the README that a device fills, parts that fail, verdicts."""

import json
import os
import re
import resource
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import device_check as check
from benchmarks import ingest_device as ingest
from benchmarks.card_24gb.plan import quick_plan
from benchmarks.device import build, findings, headline, probe, sanitizer
from benchmarks.kernel_bench.targets import targets as kernel_targets
from tests.support.made_results import finding, results_of
from tests.support.processes import once

ROOT = Path(check.ROOT)


# ------------------------------------------------------------------------------------------------------- a rehearsal


@pytest.fixture(scope="module")
def rehearsal(request):
    """The folder of one whole rehearsal, its results, and the processor seconds that it took."""

    def rehearse(folder):
        out, before = folder / "out", resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, str(ROOT / "benchmarks" / "device_check.py"), "--rehearse", "--out", str(out)]
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run.returncode == 0, run.stdout + run.stderr + (out / "log.txt").read_text()[-4000:]
        (folder / "spent").write_text(str(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))

    folder = once(request, "rehearsal", rehearse)
    out = folder / "out"
    return out, json.loads((out / "results.json").read_text()), float((folder / "spent").read_text())


@pytest.mark.slow
def test_a_rehearsal_runs_every_part(rehearsal):
    out, results, spent = rehearsal
    assert [(row["part"], row["status"]) for row in results["parts"]] == [(part.name, "done") for part in check.PARTS]
    assert {found["part"] for found in results["findings"]} == {part.name for part in check.PARTS}
    assert len(list(out.iterdir())) <= 8
    assert spent < 110  # of two minutes, on one core
    text = (out / "verdicts.txt").read_text()
    assert len(text.splitlines()) <= findings.LINES
    assert "FAILS" not in text
    assert all(op in text for op in ("router_topk", "sparse_ffn", "device-keys", "host in sleeping streams"))


@pytest.mark.slow
def test_a_rehearsal_measures_nothing(rehearsal):
    out, results, _ = rehearsal
    text = (out / "verdicts.txt").read_text()
    assert text.startswith("REHEARSAL")
    assert "holds" not in [line.split()[0] for line in text.splitlines()]
    assert not re.search(r"[GMT](B|flop)/s|tokens/s| ms\b", text)
    unmeasured = {found["what"] for found in results["findings"] if found["measured"] == findings.UNMEASURED}
    assert {"page locks", "link up", "zero-copy gather", "memcheck", "racecheck", "kernels"} <= unmeasured
    assert sum("tokens_per_s" in row["values"].get("row", {}) for row in results["findings"]) > 0
    assert all(row["tokens_per_s"] is None for row in ingest.rows(results))
    assert ingest.cells(results) == {}


@pytest.mark.slow
def test_a_rehearsal_stays_out_of_the_results(rehearsal, tmp_path, capsys):
    out, _, _ = rehearsal
    with pytest.raises(SystemExit):
        ingest.main([str(out / "results.json")])
    assert "not benchmarks/results" in capsys.readouterr().err
    assert ingest.main([str(out / "results.json"), "--out", str(tmp_path)]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert {"device_rehearsal.json", "device_rehearsal.md", "device_rehearsal_24gb.json"} <= names
    assert str(out) not in (tmp_path / "device_rehearsal.json").read_text()


# --------------------------------------------------------------------------------------------------------- the README

PAGES = "".join(page.read_text() for page in ingest.marked_pages(ROOT))


def rows_of_a_device(dry):
    """A row of a rehearsal for each cell that part "headline" measures, as if it had been."""
    cells = [cell for group in quick_plan() for cell in group.cells if re.search(headline.CELLS, cell.title())]
    assert {cell.contestant for cell in cells} > {"null", "meft auto", "lora"}
    assert {*dry} >= {column for column, _ in ingest.COLUMNS.values()} - {"bound_ms", "of_null"}
    numbers = {column: 1.5 for column, _ in ingest.COLUMNS.values()}
    return [dry | numbers | cell.key | {"status": "measured"} for cell in cells]


def findings_of_a_device(monkeypatch, capsys):
    """What parts "probe" and "kernels" say of a device, from their own code and made-up rates."""
    names = ("to_device", "to_host", "both_ways", "host_bytes", "device_bytes", "flops", "host_flops")
    rates = SimpleNamespace(**dict.fromkeys(names, 5e10))
    found = SimpleNamespace(alone=rates, contended=rates, zero_copy=3e10)
    monkeypatch.setattr(probe.calibration, "calibrated", lambda device, anew: found)
    monkeypatch.setattr(probe, "zero_copy_gather", lambda device, ceiling: None)
    capsys.readouterr()
    probe.environment(False)
    probe.link(torch.device("cpu"))
    said = [findings.heard(line) for line in capsys.readouterr().out.splitlines()]
    said = [each | {"part": "probe"} for each in said if each]
    return said + [finding(target.name, "worst of 3: 1.5", part="kernels") for target in kernel_targets([], "X9", 90)]


@pytest.mark.slow
def test_a_device_fills_every_mark(rehearsal, tmp_path, monkeypatch, capsys):
    out, results, _ = rehearsal
    marks = [match[2] for match in ingest.MARKED.finditer(PAGES)]
    assert len(set(marks)) > 20
    assert PAGES.count("<!-- device:") == PAGES.count("<!-- /device -->") == len(marks)
    copy = tmp_path / "README.md"
    copy.write_text(PAGES)
    # A rehearsal has measured nothing: all stays as it is.
    ingest.main([str(out / "results.json"), "--out", str(tmp_path / "out"), "--readme", str(copy)])
    assert copy.read_text() == PAGES
    capsys.readouterr()

    name, dry = next((name, json.loads(text)["rows"][0]) for name, text in results["files"].items() if "24gb" in name)
    files = {name: json.dumps({"rows": rows_of_a_device(dry)})}
    whole = results_of(*findings_of_a_device(monkeypatch, capsys), files=files)
    path = tmp_path / "results.json"
    for began in ("2030-01-02", "2031-03-04"):  # a later run replaces what an earlier one wrote
        path.write_text(json.dumps(whole | {"began": began}))
        ingest.main([str(path), "--out", str(tmp_path / "out"), "--readme", str(copy)])
        assert capsys.readouterr().out.endswith(f"{len(marks)} cells\n")  # and none without a value
        filled = copy.read_text()
        assert filled.count(f"(measured on NVIDIA X9, {began})<!-- /device -->") == len(marks)
        assert ingest.MARKED.sub("", filled) == ingest.MARKED.sub("", PAGES)


# -------------------------------------------------------------------------------------------------------------- parts


@pytest.fixture
def parts(monkeypatch, tmp_path):
    """Parts from Python lines; runs them and gives what came out."""

    def run(arguments=(), **lines):
        folder = tmp_path / "code"
        folder.mkdir(exist_ok=True)
        made = []
        for name, (code, *rest) in lines.items():
            (folder / f"part_{name}.py").write_text(f"import sys, time, pathlib\n{code}\n")
            made.append(check.Part(name, (f"part_{name}",), *(rest or [20.0])))
        monkeypatch.setattr(check, "PARTS", tuple(made))
        monkeypatch.setenv("PYTHONPATH", str(folder))
        out = tmp_path / "out"
        code = check.main(["--out", str(out), *arguments])
        return code, json.loads((out / "results.json").read_text()), out

    return run


GOOD = "from benchmarks.device.findings import say\nsay('good', 'yes', True, 'yes')"


def test_a_part_that_fails_or_is_late_does_not_stop_the_next(parts):
    began = time.perf_counter()
    code, results, out = parts(
        bad=(f"{GOOD}\n1/0",), slow=(f"{GOOD}\ntime.sleep(60)", 7.0), gone=("import os; os.kill(os.getpid(), 9)",),
        good=(GOOD,),
    )  # fmt: skip
    assert time.perf_counter() - began < 40
    assert code == 1
    assert [row["status"] for row in results["parts"]] == ["exit code 1", "late", "exit code -9", "done"]
    assert [found["part"] for found in results["findings"]] == ["bad", "slow", "good"]  # also of those that failed
    assert "ZeroDivisionError" in (out / "log.txt").read_text()
    assert (out / "verdicts.txt").read_text().count("FAILS ") == 3


def test_a_target_that_does_not_hold_is_an_exit_code(parts):
    assert parts(good=(GOOD,))[0] == 0
    assert parts(wrong=(GOOD.replace("True", "False"),))[0] == 1
    assert parts(open=(GOOD.replace("True", "None"),))[0] == 0


def alive(state):
    try:
        return state.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_a_late_part_has_started_ends_with_it(parts, tmp_path):
    child = "import subprocess; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    keep = f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(p.pid)); time.sleep(60)"
    parts(slow=(f"{child}\n{keep}", 8.0))
    state = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    ends = time.monotonic() + 10  # a killed process may need a moment
    while alive(state):
        assert time.monotonic() < ends
        time.sleep(0.05)


def test_out_of_time_and_some_parts_only(parts):
    code, results, _ = parts(["--seconds", "20", "--only", "b"], a=(GOOD,), b=(GOOD, 20.0, 60.0))
    assert code == 1
    assert [(row["part"], row["status"]) for row in results["parts"]] == [("b", "not run: out of time")]


def test_a_short_run_has_the_first_four_parts():
    assert [part.name for part in check.PARTS if part.lean] == ["build", "probe", "ops", "engine"]
    assert [part.lean for part in check.PARTS] == [True] * 4 + [False] * 5
    assert sum(part.most for part in check.PARTS if part.lean) < 260


def test_texts_are_kept_and_plots_lie_beside(parts):
    keep = "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])"
    files = (
        "(out / 'a_24gb.json').write_text('{}'); (out / 'b.png').write_bytes(b'1'); (out / 'c.so').write_bytes(b'1')"
    )
    _, results, out = parts(files=(f"{keep}\n{files}",))
    assert results["files"] == {"a_24gb.json": "{}"}
    assert {path.name for path in out.iterdir()} == {"results.json", "verdicts.txt", "log.txt", "b.png"}


def test_the_gate_is_left_out_only_where_it_has_passed(tmp_path):
    results = check.Results(tmp_path, False)
    assert not check.checked(results)
    results.add("engine", finding("gate of bench_24gb", holds=True))
    assert check.checked(results)
    results.add("engine", finding("gate of bench_24gb, meft host", holds=False))
    assert not check.checked(results)


def test_memory_that_may_be_taken_is_said_once(monkeypatch):
    monkeypatch.delenv("ASLORA_MEFT_HOST_GIB", raising=False)
    said = float(check.model_profile(False)["ASLORA_MEFT_HOST_GIB"])
    assert 0 < said < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    monkeypatch.setenv("ASLORA_MEFT_HOST_GIB", "7")
    assert check.model_profile(False)["ASLORA_MEFT_HOST_GIB"] == "7"
    assert check.model_profile(False)["OMP_WAIT_POLICY"] == "PASSIVE"


def test_the_call_for_a_bare_machine_is_one_short_line():
    call = check.__doc__.split("as one line:\n")[1].replace("\\\n", "").strip()
    assert "\n" not in call
    assert len(call) < 2000
    assert subprocess.run(["bash", "-n", "-c", call], check=False).returncode == 0
    command, _, options = call.partition("benchmarks/device_check.py ")[2].partition("$OUT")
    assert command == "--out "
    assert check.parse(["--out", "out", *options.split()]).seconds == 480


# ----------------------------------------------------------------------------------------------------------- verdicts


def test_failures_come_first_and_the_table_is_short():
    found = [finding(f"info {i}") for i in range(80)] + [finding("right", holds=True), finding("bad", holds=False)]
    lines = findings.table(results_of(*found)).splitlines()
    assert len(lines) <= 60
    assert lines[2].startswith("FAILS")
    assert lines[3].startswith("holds")
    assert "more in results.json" in lines[-2]
    assert lines[-1] == "1 FAILS, 1 holds"


def test_a_line_keeps_its_target():
    said = findings.line(finding("x" * 300, holds=True, target=">= 0.9"), False)
    assert len(said) <= findings.WIDTH
    assert said.endswith("... [>= 0.9]")


def test_what_a_sanitizer_says():
    right = findings.MARK + json.dumps(finding("row_union", counts={"all": [4, 4]}, left=1))
    clean = f"{right}\n========= ERROR SUMMARY: 0 errors\n"
    assert sanitizer.judged(clean, 0) == ("0 errors; 4 checks right, 1 not run; exit code 0", True)
    race = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    assert sanitizer.judged(f"{right}\n{race}", 0)[1]
    for output, code in (
        (clean.replace("0 errors", "2 errors"), 9), (clean, 9), (right, 0), (clean.replace("4, 4", "0, 0"), 0),
        (clean, "late"), (f"{right}\n{race.replace('0 hazards', '3 hazards')}", 0),
    ):  # fmt: skip
        assert not sanitizer.judged(output, code)[1]


def test_libraries_are_built_where_their_packages_look_for_them():
    names = [library["name"] for library in build.libraries()]
    assert names == ["adapter_kernels.topk._host_topk", "meft.table._row_adamw"]
    for library in build.libraries():
        package = find_spec(library["name"].rpartition(".")[0])
        assert build.place(library).parent == Path(package.submodule_search_locations[0])
