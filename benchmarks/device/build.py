"""Part "build": the C++ libraries by their own flags, and the launches of a step, which fill Triton's cache."""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

from benchmarks.device.findings import ROOT, UNMEASURED, arguments, say


def libraries() -> list[dict]:
    """As pyproject.toml names them."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]


def place(library: dict) -> Path:
    """Where its package looks for it: beside its sources."""
    return ROOT / Path(library["sources"][0]).parent / f"{library['name'].rpartition('.')[2]}.so"


def build(library: dict, target: Path, flags: tuple[str, ...] = ()) -> bool:
    """Compile one library, with `flags` after its own; whether it loads."""
    began = time.perf_counter()
    compiler = os.environ.get("CXX", "g++")
    command = [
        compiler,
        *library["extra-compile-args"],
        *flags,
        "-shared",
        "-fPIC",
        *library["sources"],
        "-o",
        str(target),
    ]
    run = subprocess.run(
        command + library.get("extra-link-args", []), cwd=ROOT, capture_output=True, text=True, check=False
    )
    print(" ".join(command), run.stdout, run.stderr, sep="\n", flush=True)
    loads = run.returncode == 0
    if loads:
        try:
            ctypes.CDLL(str(target))
        except OSError as error:
            loads = False
            print(error, flush=True)
    said = f"built in {time.perf_counter() - began:.1f} s" if loads else (run.stderr.strip() or "not loaded")[-200:]
    say(library["name"], said, loads, "compiles and loads")
    return loads


def warm(seconds: float) -> None:
    """Compile kernels side by side; what comes out is judged by the parts that follow."""
    began = time.perf_counter()
    commands = [["benchmarks.device.engine", "--warm"]]
    small = ["benchmarks.device.ops", "--here", "--tiny", "--right-only", "--only"]
    commands += [[*small, op] for op in ("expert_topk", "sparse_ffn")]
    running = [
        subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for command in commands
    ]
    codes = []
    for process in running:
        try:
            codes.append(process.wait(max(1.0, seconds - (time.perf_counter() - began))))
        except subprocess.TimeoutExpired:
            process.kill()
            codes.append(process.wait())
    say("first launches", f"{time.perf_counter() - began:.1f} s, exit codes {codes}", codes=codes)


def main() -> int:
    began, given = time.perf_counter(), arguments(__doc__).parse_args()
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        say("C++ libraries", f"{UNMEASURED}: no g++ here", None if given.rehearse else False, "compile and load")
        return int(not given.rehearse)
    with tempfile.TemporaryDirectory() as folder:
        built = []
        for library in libraries():
            target = place(library)
            # A rehearsal leaves what is installed as it is, and need not be fast.
            there = any(target.parent.glob(f"{target.stem}.*so"))
            if given.rehearse and there:
                built.append(build(library, Path(folder, target.name), ("-O0",)))
            else:
                built.append(build(library, target))
    if given.rehearse:
        say("first launches", UNMEASURED)
    else:
        warm(given.seconds - (time.perf_counter() - began))
    return int(not all(built))


if __name__ == "__main__":
    sys.exit(main())
