"""Tests for a CUDA device: `make test-gpu`. Where there is none, their bodies run on the CPU.

A test takes `device`, and has then a variant "cpu", which is part of every run, and a variant "cuda", which is marked
`gpu`. The kernels' tests have the CPU in Triton's interpreter: `tests/adapter_kernels/test_interpreted.py`.
"""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # runs are compared bit for bit

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from device.findings import use_tests

use_tests("meft", "adapter_kernels")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames and "device" not in str(metafunc.definition.own_markers):
        metafunc.parametrize("device", DEVICES, indirect=True)


@pytest.fixture
def device(request):
    """Where a test computes."""
    return torch.device("cuda", torch.cuda.current_device()) if request.param == "cuda" else torch.device(request.param)
