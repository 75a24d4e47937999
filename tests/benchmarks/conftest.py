"""What the tests of several benchmarks share."""

import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "benchmarks"), str(Path(__file__).parent)]


@pytest.fixture
def one_thread(monkeypatch):
    """Torch and our own loops compute in one thread."""
    monkeypatch.setenv("ASLORA_MEFT_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
