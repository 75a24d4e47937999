r"""Everything that a CUDA machine can prove and measure, in a few minutes, with one command.

    python benchmarks/device_check.py                            # 480 seconds, into ./device-check
    python benchmarks/device_check.py --seconds 240              # the first four parts: do we compute the right thing?
    python benchmarks/device_check.py --only headline kernels    # some parts, each as long as it may take
    python benchmarks/device_check.py --rehearse                 # all parts on the CPU, tiny; measures nothing

Parts, each in a process of its own with a limit: build and warm, probe, ops, engine, sleepy, tier, headline,
sanitizer, kernels. One that fails does not stop the next. OUT gets results.json (after each part, with all that was
found and the result files of the benchmarks in it), verdicts.txt, log.txt and at most two plots; `ingest_device.py`
makes committed result files of results.json. The exit code is 1 where a part failed or a target does not hold.

On a bare machine without a package registry (torch, triton, transformers, accelerate, numpy, pytest, hypothesis and g++
are there, peft is not): on a machine with a registry, in the checkout,

    echo /.whl/ >> .git/info/exclude
    python3 -m pip download --no-deps --only-binary=:all: -d .whl peft==0.21.2

(bitsandbytes==0.50.2 adds the NF4 rows, 43 MB; trl, datasets, dill, multiprocess, xxhash add nothing here), then copy
the checkout with .whl there and call, in its root, as one line:

    site=$(mktemp -d) && python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target $site \
        .whl/*.whl && PYTHONPATH=$site python3 benchmarks/device_check.py --out $OUT --seconds 480
"""

import argparse
import datetime
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.device.findings import heard, table  # noqa: E402
from benchmarks.device_rehearsal import FORKED, Forked  # noqa: E402

LOG_BYTES = 8 << 20
TEXT_BYTES = 2 << 20  # of a result file that is kept in results.json
KEPT = (".json", ".csv", ".txt", ".md")
RESERVE_S = 6.0  # for the last words


@dataclass(frozen=True)
class Part:
    """A process.

    Attributes:
        most: seconds after which it is ended. least: with fewer left it does not begin.
        lean: whether it is one of those that a short run has.
    """

    name: str
    command: tuple[str, ...]
    most: float
    least: float = 15.0
    lean: bool = False


PARTS = (
    Part("build", ("benchmarks.device.build",), 45, lean=True),
    Part("probe", ("benchmarks.device.probe",), 50, lean=True),
    Part("ops", ("benchmarks.device.ops",), 80, lean=True),
    Part("engine", ("benchmarks.device.engine",), 75, lean=True),
    Part("sleepy", ("benchmarks.device.engine", "--sleepy"), 35),
    Part("tier", ("benchmarks.hot_rows.on_device",), 45, 20),
    Part("headline", ("benchmarks.device.headline",), 195, 75),
    Part("sanitizer", ("benchmarks.device.sanitizer",), 90, 45),
    Part("kernels", ("benchmarks.device.kernels",), 110, 35),
)
LEAN_SECONDS = 240.0


@dataclass
class Results:
    """What is written to results.json."""

    out: Path
    rehearsal: bool
    held: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.held = {
            "version": 1, "rehearsal": self.rehearsal, "began": began, "source": source(),
            "machine": {}, "parts": [], "findings": [], "files": {},
        }  # fmt: skip

    def add(self, part: str, found: dict) -> None:
        if part == "probe" and found["what"] == "machine":
            self.held["machine"] = found["values"]
        self.held["findings"].append(found | {"part": part})

    def write(self) -> None:
        """Replace the file, whole."""
        path = self.out / "results.json"
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps(self.held, indent=1) + "\n")
        beside.replace(path)


def source() -> dict[str, str]:
    """Which code runs: the commit where git knows it, and a digest of the sources."""
    digest = hashlib.sha256()
    for folder in ("adapter_kernels", "meft", "peft_bridge", "benchmarks"):
        place = ROOT / "kernels" / folder if folder == "adapter_kernels" else ROOT / folder
        for path in sorted([*place.rglob("*.py"), *place.rglob("*.cpp")]):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    commit = ""
    if shutil.which("git"):
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {"commit": commit, "digest": digest.hexdigest()[:16]}


def host_gib() -> float | None:
    """What MEFT may take of host memory: nine tenths of the machine's, or of the control group's limit.

    Where memory grows as it is used, MemAvailable says too little at first.
    """
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        found.append(int(meminfo.read_text().split("MemTotal:")[1].split()[0]) / 2**20)
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and limit.read_text().strip().isdigit():
        found.append(int(limit.read_text()) / 2**30)
    return round(0.9 * min(found), 1) if found else None


def model_profile(rehearse: bool) -> dict[str, str]:
    """The environment of a part."""
    folders = [str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    found = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, folders)), "PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    gib = host_gib()
    if gib is not None and not rehearse:
        found.setdefault("ASLORA_MEFT_HOST_GIB", str(gib))
    if rehearse:
        found |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        found.pop("TRITON_INTERPRET", None)
    return found


def end(process: subprocess.Popen | Forked) -> None:
    """End a part and what it has started."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
            process.wait(3)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def run(part: Part, options: list[str], limit: float, results: Results, environment: dict[str, str]) -> dict:
    """Run a part; its findings are kept as they come.

    Returns:
        its row: the exit code, or that it was late, and its seconds.
    """
    began = time.perf_counter()
    words = [*part.command, *options, "--seconds", f"{limit - RESERVE_S:.0f}"]
    late = threading.Event()
    with tempfile.TemporaryDirectory() as folder, (results.out / "log.txt").open("a") as log:
        command = [sys.executable, "-W", "ignore", "-m", *words, "--out", folder]
        log.write(f"\n##### {part.name}: {' '.join(command)}\n")
        log.flush()
        if results.rehearsal and part.name in FORKED:
            process: subprocess.Popen | Forked = Forked([*words, "--out", folder], str(ROOT), environment)
        else:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=ROOT,
                env=environment, start_new_session=True,
            )  # fmt: skip
        timer = threading.Timer(limit, lambda: (late.set(), end(process)))
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            found = heard(line)
            if found is not None:
                results.add(part.name, found)
            log.write(line)
        code = process.wait()
        timer.cancel()
        end(process)  # what it may have left running
        keep_files(Path(folder), results)
    status = "late" if late.is_set() else "done" if code == 0 else f"exit code {code}"
    return {"part": part.name, "status": status, "seconds": round(time.perf_counter() - began, 1), "limit": limit}


def keep_files(folder: Path, results: Results) -> None:
    """Texts go into results.json, plots beside it."""
    for path in sorted(folder.iterdir()):
        if path.suffix in KEPT and path.stat().st_size <= TEXT_BYTES:
            results.held["files"][path.name] = path.read_text(errors="replace")
        elif path.suffix == ".png":
            shutil.copy(path, results.out / path.name)


def checked(results: Results) -> bool:
    """Whether the strategies' training was found right on this device, so that the benchmark need not look again."""
    gates = [each for each in results.held["findings"] if each["part"] == "engine" and "gate of" in each["what"]]
    return bool(gates) and all(each["holds"] is True for each in gates)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("device-check"), help="folder of the files")
    parser.add_argument("--seconds", type=float, default=480.0, help="time limit; up to 240: the first four parts")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], metavar="PART")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU; measures nothing")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    began, given = time.perf_counter(), parse(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "log.txt").write_text("")
    results = Results(given.out.resolve(), given.rehearse)
    for part in PARTS:
        short = given.seconds <= LEAN_SECONDS and not given.rehearse
        if (part.name not in given.only) if given.only else (short and not part.lean):
            continue
        left = given.seconds - RESERVE_S - (time.perf_counter() - began)
        if left < (1 if given.rehearse else part.least):
            row = {"part": part.name, "status": "not run: out of time", "seconds": 0.0, "limit": 0.0}
        else:
            options = ["--rehearse"] * given.rehearse
            options += ["--checked"] * (part.name == "headline" and checked(results))
            # The environment is made for each part: a machine may have more memory once some was touched.
            # A rehearsal measures nothing: on busy cores it may take what time it needs.
            limit = left if given.only or given.rehearse else min(part.most, left)
            row = run(part, options, limit, results, model_profile(given.rehearse))
        results.held["parts"].append(row)
        results.write()
        print(f"{row['part']:10} {row['status']:24} {row['seconds']:6.1f} s", flush=True)
    log = results.out / "log.txt"
    if log.stat().st_size > LOG_BYTES:
        log.write_bytes(log.read_bytes()[-LOG_BYTES:])
    text = table(results.held)
    (results.out / "verdicts.txt").write_text(text + "\n")
    print(text)
    failed = any(row["status"] != "done" for row in results.held["parts"])
    return int(failed or any(each["holds"] is False for each in results.held["findings"]))


if __name__ == "__main__":
    sys.exit(main())
