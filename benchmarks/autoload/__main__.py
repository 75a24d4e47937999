"""What `aslora_meft_autoload` costs at `import torch`: importing it and calling `install`, as torch does.

    python -m benchmarks.autoload

Warm: the file was read before. Cold: a fresh copy, whose pages the kernel was told to forget (posix_fadvise). With
bytecode and, as where Python cannot keep it, without. Each number is a new process with nothing but Python in it.
"""

import argparse
import os
import py_compile
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "aslora_meft_autoload.py"
CHILD = """
import importlib, os, sys, time, typing  # torch has imported these
sys.path.insert(0, sys.argv[1])
wall, cpu = time.perf_counter(), time.process_time()
import aslora_meft_autoload
aslora_meft_autoload.install()
print(1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu))
"""


def forget(file: Path) -> None:
    """Write a file to the disk and drop its pages."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def measure(cold: bool, bytecode: bool) -> tuple[float, float]:
    """Milliseconds of the clock and of the CPU, in a new process with a copy of the file."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copy(SOURCE, folder))
        if bytecode:
            py_compile.compile(str(copy))
        if cold:
            for file in Path(folder).rglob("*.py*"):
                forget(file)
        words = [sys.executable, "-B", "-c", CHILD, folder]
        done = subprocess.run(words, capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]})
    wall, cpu = map(float, done.stdout.split())
    return wall, cpu


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    args = parser.parse_args(arguments)
    print("| file | bytecode | wall ms, least | wall ms, median | CPU ms, least |")
    print("|---|---|---|---|---|")
    for cold in (False, True):
        for bytecode in (True, False):
            walls, cpus = zip(*(measure(cold, bytecode) for _ in range(args.runs)), strict=True)
            cells = (f"{value:.2f}" for value in (min(walls), statistics.median(walls), min(cpus)))
            print(f"| {'cold' if cold else 'warm'} | {'yes' if bytecode else 'no'} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
