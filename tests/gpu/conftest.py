"""Tests for a CUDA device: `make test-gpu`. Where there is none, their bodies run on the CPU.

A test takes `device`, and has then a variant "cpu", which is part of every run, and a variant "cuda", which is marked
`gpu`. The kernels' tests have the CPU in Triton's interpreter: `tests/adapter_kernels/test_interpreted.py`.
"""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # runs are compared bit for bit

import pytest
import torch

from meft.transport.streams import CudaStreams
from tests.support.fake_cuda import FakeCuda


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where a test computes."""
    return torch.device("cuda", torch.cuda.current_device()) if request.param == "cuda" else torch.device("cpu")


@pytest.fixture
def streams(device, monkeypatch):
    """None: those of the device. On the CPU the real ones over a stand-in for `torch.cuda`, as late as they can be."""
    if device.type == "cuda":
        return None
    FakeCuda(monkeypatch)
    return CudaStreams(device)
