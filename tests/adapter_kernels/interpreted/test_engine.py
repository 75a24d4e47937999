"""The engine of one layer with the kernels that a GPU would run: forward, backward and a step, bit for bit.

The CPU is taken for a CUDA device where the engine asks; what it does in host memory goes on as it is.
"""

import sys
from collections import Counter
from contextlib import contextmanager

import pytest
import torch

import meft.retrieval.strategies.host
from adapter_kernels.runtime import dispatch
from benchmarks.device.chain import STRATEGIES, Setting, difference, trained
from meft.transport.streams import HostStreams
from tests.support.kernels.mutants import mutant

CPU = torch.device("cpu")
SIZE = {"layers": 1, "tokens": 20, "steps": 1}
# Who asks whether tensors are on a CUDA device.
THERE = ("meft.retrieval.strategies.base", "meft.retrieval.strategies.resident", "meft.transport.transfer")
ON_DEVICE = {"sparse_ffn", "row_union", "router_topk", "expert_topk"}


@contextmanager
def as_on_cuda(monkeypatch):
    """Yields how often each op ran its kernels."""
    launched, on_host = Counter(), []

    def use_triton(impl, device, unsupported=()):
        if on_host or any(unsupported):
            return False
        launched[sys._getframe(1).f_globals["__name__"].rpartition(".")[2]] += 1
        return True

    picked = meft.retrieval.strategies.host._selected

    def picked_on_the_host(*args):
        on_host.append(True)
        try:
            return picked(*args)
        finally:
            on_host.pop()

    asked = property(lambda tensor: sys._getframe(1).f_globals["__name__"] in THERE)
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "use_triton", use_triton)
        patch.setattr(meft.retrieval.strategies.host, "_selected", picked_on_the_host)
        patch.setattr(torch.Tensor, "is_cuda", asked)
        patch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        yield launched


@pytest.fixture(scope="module")
def in_place():
    return {
        compute_dtype: trained(Setting(compute_dtype=compute_dtype), CPU, **SIZE)
        for compute_dtype in ("bfloat16", "float32")
    }


@pytest.mark.parametrize("zero_copy", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_layer_with_its_kernels_equals_rows_in_place(fenced, monkeypatch, in_place, strategy, zero_copy):
    # One has rows in the dtype of the inputs and keeps them, the other has narrower ones and brings them again.
    compute_dtype, rows = ("float32", "refetch") if zero_copy else ("bfloat16", "save")
    with as_on_cuda(monkeypatch) as launched:
        found = trained(
            Setting(strategy, rows, zero_copy=zero_copy, compute_dtype=compute_dtype), CPU, HostStreams(CPU), **SIZE
        )
    assert difference(found, in_place[compute_dtype]) == ""
    expected = {"sparse_ffn"} if strategy == "host" else set(ON_DEVICE)
    expected |= {"gather_rows"} if strategy != "device-rows" else set()
    assert expected <= launched.keys()
    assert ("row_adamw" in launched) == zero_copy


def test_a_wrong_kernel_shows(fenced, monkeypatch, in_place, tmp_path):
    mutant(tmp_path, monkeypatch, "sparse_ffn", "ds = ds * factor", "ds = ds")
    with as_on_cuda(monkeypatch):
        found = trained(Setting("device-rows"), CPU, HostStreams(CPU), **SIZE)
    assert difference(found, in_place["bfloat16"])
