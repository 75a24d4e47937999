"""The tests below `interpreted/`, in a process where Triton's interpreter runs the kernels on CPU tensors.

So do those of the ops on a GPU, which run on the CPU here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FILES = [Path(__file__).parent / "interpreted", Path(__file__).parents[1] / "gpu" / "test_ops.py"]
LEAST = 256  # a loss of coverage is a failure too


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=10", *map(str, FILES)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)
    assert run.returncode == 0, run.stdout[-12000:] + run.stderr[-4000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed
    assert int(passed[1]) >= LEAST
    assert "skipped" not in run.stdout, run.stdout[-4000:]
