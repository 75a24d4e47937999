"""Launch tables: capability entries over defaults, overrides over both."""

import pytest
import torch

from adapter_kernels.runtime import dispatch
from adapter_kernels.runtime import launch_config as launch
from adapter_kernels.runtime import triton_shim as jit


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(launch, "_tables", {})
    return launch.Table("op.kernel", {"BM": 16, "num_warps": 4}, {90: {"BM": 64}})


def test_a_capability_changes_what_it_names(table):
    assert table.at(90) == {"BM": 64, "num_warps": 4}
    assert table.at(75) == table.at(None) == table.on(torch.device("cpu")) == {"BM": 16, "num_warps": 4}


def test_an_override_ends_with_its_block(table):
    with launch.override("op.kernel", num_warps=8):
        with launch.override("op.kernel", BM=32):
            assert table.at(90) == {"BM": 32, "num_warps": 8}
        assert table.at(90) == {"BM": 64, "num_warps": 8}
    assert table.at(90) == {"BM": 64, "num_warps": 4}


@pytest.mark.parametrize(
    ("name", "field", "message"),
    [("op.other", "BM", "name: no kernel 'op.other'"), ("op.kernel", "BN", r"fields: op.kernel has no \['BN'\]")],
)
def test_an_override_must_exist(table, name, field, message):
    with pytest.raises(ValueError, match=message), launch.override(name, **{field: 1}):
        pass


def test_what_a_kernel_does_not_take_goes_to_torch(monkeypatch):
    for name, value in (("AVAILABLE", True), ("INTERPRETED", False)):
        monkeypatch.setattr(jit, name, value)
    device, unsupported = torch.device("cuda"), [("K", "too large")]
    assert dispatch.use_triton(None, device)
    assert not dispatch.use_triton(None, device, unsupported)
    with pytest.raises(ValueError, match="K: too large; pass impl='torch'"):
        dispatch.use_triton("triton", device, unsupported)
