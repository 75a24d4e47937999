"""What the tests of several benchmarks share."""

import pytest
import torch


@pytest.fixture
def one_thread(monkeypatch):
    """Torch and our own loops compute in one thread."""
    monkeypatch.setenv("ASLORA_MEFT_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
