"""Tests that run kernels in Triton's interpreter, in a process of their own: see `test_interpreted.py` above.

By hand: TRITON_INTERPRET=1 python -m pytest tests/adapter_kernels/interpreted
"""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    import pytest
    import torch
    from hypothesis import HealthCheck, settings

    from tests.support.kernels import kernel_checks
    from tests.support.kernels.interpreter_repair import repair

    repair()
    torch.set_num_threads(1)
    # A launch takes milliseconds a program here: few and small examples.
    settings.register_profile("interpreter", deadline=None, max_examples=8, suppress_health_check=list(HealthCheck))
    settings.load_profile("interpreter")

    @pytest.fixture
    def fenced(monkeypatch):
        """Whatever ops allocate within is poisoned; what they write outside of it fails the test."""
        with kernel_checks.fenced_memory(monkeypatch):
            yield
else:
    # Interpreted and compiled kernels do not mix in one process.
    collect_ignore_glob = ["test_*.py"]
