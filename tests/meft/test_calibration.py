"""Measuring a machine, here a CPU without a link, and keeping what was measured."""

import json
import math
from contextlib import nullcontext
from dataclasses import asdict, replace

import pytest
import torch

from adapter_kernels.adamw.moment_layout import MODES
from meft.cost import calibration
from meft.cost.calibration import Calibration, Sizes, cache_file, calibrated, measure, name_of

CPU = torch.device("cpu")
SMALL = Sizes(copied=1 << 16, on_device=1 << 16, gemm=64, d=64, r=64, updated=16, tokens=4, repeats=1)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []
    monkeypatch.setattr(calibration, "measure", lambda device: calls.append(device) or measure(device, SMALL))
    return calls


def test_every_ceiling_is_measured():
    found = measure(CPU, SMALL)
    for ceilings in (found.alone, found.contended):
        assert all(math.isfinite(rate) and rate > 0 for rate in asdict(ceilings).values())
    assert found.contended.host_flops != found.alone.host_flops  # measured anew beside the updates
    assert "row optimizer, GB/s" in str(found)
    assert found.zero_copy is None  # a CPU is no device that would do it
    assert "zero_copy" not in str(found)
    assert list(found.modes) == list(MODES)
    assert "row updates, moments=rowwise, Gvalues/s" in str(found)
    assert "row optimizer, zero_copy, GB/s            12.5" in str(replace(found, zero_copy=12.5e9))


def test_it_is_measured_once_and_kept(quick):
    first = calibrated(CPU)
    assert calibrated(CPU) == first
    assert quick == [CPU]
    assert json.loads(cache_file(CPU).read_text())["machine"] == name_of(CPU)
    calibrated(CPU, anew=True)
    assert len(quick) == 2


@pytest.mark.parametrize(
    "text", ["", "{}", '{"version": 0}', '{"version": 3}', '{"version": 4, "machine": "x", "alone": {}}', "[1]"]
)
def test_a_file_that_does_not_fit_is_measured_anew(quick, text):
    cache_file(CPU).parent.mkdir(parents=True)
    cache_file(CPU).write_text(text)
    assert isinstance(calibrated(CPU), Calibration)
    assert len(quick) == 1


def test_where_nothing_can_be_kept_it_is_measured_each_time(quick, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    calibrated(CPU), calibrated(CPU)
    assert len(quick) == 2


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_measurement_takes_of_the_device_is_given_back(monkeypatch, fails):
    """It may come in the first forward pass, beside a model that needs all of it."""
    device, calls = torch.device("cuda", 1), []

    def measured(device, sizes):
        calls.append("measured")
        if fails:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(calibration, "_measured", measured)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("given back"))
    with pytest.raises(torch.OutOfMemoryError) if fails else nullcontext():
        measure(device)
    assert calls == ["measured", "given back"]


def test_a_measurement_takes_little_of_the_device():
    sizes = Sizes()
    assert max(2 * sizes.on_device, 3 * 2 * sizes.gemm**2, 2 * sizes.copied) <= 1 << 28
