"""Lines of the device check's parts that only a GPU reaches, on a CPU that is taken for one; nothing is measured."""

import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks.device import amp, chain, engine, findings, ops, probe, sanitizer
from benchmarks.device.sleepy import SleepyStreams
from benchmarks.hot_rows import on_device as tier
from meft.cost import calibration
from tests.support.fake_cuda import FakeCuda
from tests.support.kernels.kernel_checks import PAD, Fenced, in_poison
from tests.support.kernels.on_device import on_device

CPU = torch.device("cpu")


@pytest.fixture
def told(capsys):
    """What was said since: finding by its name."""
    heard = lambda: map(findings.heard, capsys.readouterr().out.splitlines())  # noqa: E731
    return lambda: {each["what"]: each for each in heard() if each}


@pytest.fixture
def cuda(monkeypatch):
    """A CPU that is taken for a GPU."""

    class Event:
        def __init__(self, enable_timing=False):
            assert enable_timing

        def record(self):
            pass

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return 1.0

    of = SimpleNamespace(name="X9", major=9, minor=0, multi_processor_count=1, total_memory=2**30)
    slept = []
    named = {
        "Event": Event, "synchronize": lambda *_: None, "_sleep": slept.append, "get_device_properties": lambda _: of,
        "current_device": lambda: 0,
    }  # fmt: skip
    for name, value in named.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return slept


# -------------------------------------------------------------------------------------------------------------- probe


def test_the_machine(cuda, told):
    probe.environment(True)
    values = told()["machine"]["values"]
    assert (values["gpu"], values["capability"], values["torch"]) == ("X9", "9.0", torch.__version__)


def test_memory_that_is_touched(told):
    probe.memory_growth(1 / 64)
    assert told()["host memory"]["values"]["during"].keys() == {"MemTotal", "MemAvailable"}


@pytest.mark.parametrize("taken", [True, False])
def test_page_locks(monkeypatch, told, taken):
    """Two of the four share a page; all are given back."""
    locked, freed = [], []
    monkeypatch.setattr(probe, "page_lock", lambda tensor, device: locked.append(tensor) or taken)
    monkeypatch.setattr(probe, "page_unlock", lambda address, device: freed.append(address))
    pinned = lambda tensor: taken and any(tensor.untyped_storage() is part.untyped_storage() for part in locked)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "is_pinned", pinned)
    probe.locks(CPU)
    assert [part.numel() for part in locked] == [1 << 10, 25 << 10, 52_428_800, 1 << 10]
    assert locked[0].data_ptr() // 4096 == locked[3].data_ptr() // 4096
    assert freed == [part.data_ptr() for part in locked] * taken
    assert told()["page locks"]["measured"].count("locked" if taken else "refused") == 4


def test_the_link(monkeypatch, cuda, told):
    monkeypatch.setattr(probe, "page_lock", lambda tensor, device: True)
    monkeypatch.setattr(probe, "page_unlock", lambda address, device: None)
    monkeypatch.setattr(calibration, "calibrated", lambda device, anew: calibration.measure(device, probe.TINY))
    module = sys.modules["adapter_kernels.rows.gather_rows"]  # the package has a function of this name
    monkeypatch.setattr(module, "_host_memory_reachable", lambda device: False)
    probe.link(CPU)
    found = told()
    gathered = found["zero-copy gather of 1,664 x 2 rows of 8 KiB"]
    assert gathered["values"]["gb_s"] == pytest.approx(2 * 1664 * 8192 / 1e-3 / 1e9)  # in the fake's millisecond
    assert found["kernels reach page-locked host memory"]["holds"] is False
    assert found["row update by the device (zero_copy)"]["measured"] == "refused"
    assert {"link up", "link down", "link both ways, sum", "16-bit GEMM", "device memory, copy"} <= found.keys()


def test_copies_that_come_late(cuda, told):
    amp.late_copies(CPU)
    assert told()["copies to the CPU that do not block, read at once"]["values"] == {"stale": 0}
    assert len(cuda) == 5


@pytest.mark.parametrize("spoil", ["scale", "flag"])
def test_a_grad_scaler_that_reads_too_early_is_noticed(monkeypatch, told, spoil):
    """As the late copies of torch would have it: another scale, or a flag that is lost."""
    true = torch._amp_foreach_non_finite_check_and_unscale_

    def early(gradients, found_inf, inverse_scale):
        true(gradients, found_inf, inverse_scale * (2 if spoil == "scale" else 1))
        if spoil == "flag":
            found_inf.zero_()

    monkeypatch.setattr(torch, "_amp_foreach_non_finite_check_and_unscale_", early)
    amp.check(CPU, False)
    found = told()
    scaled, overflow = "GradScaler: row gradients on the host", "GradScaler: an overflow in rows on the host"
    assert (found[scaled]["holds"], found[overflow]["holds"]) == (spoil != "scale", spoil != "flag")


# ----------------------------------------------------------------------------------------------------- ops and engine


def test_an_op_on_a_device_gives_back_all_that_it_wrote():
    """Through strides and offsets, in place, beside its tensors, and by autograd."""

    def op(x, tables, factor=None):
        x.as_strided((x.numel() + 1,), (1,))[-1] = 7.0  # past the end
        tables[0].mul_(2)
        return [tables[0] + factor, x.T]

    fenced, table = Fenced((2, 3), torch.float32), in_poison(torch.ones(4, 3))
    fenced.tensor.zero_()
    factor = torch.full((3,), 5.0, requires_grad=True)
    total, x = on_device(op, "cpu")(fenced.tensor, [table[::2]], factor=factor)
    assert not fenced.intact()
    assert torch.equal(table, torch.tensor([2.0, 1, 2, 1])[:, None].expand(4, 3))
    assert torch.equal(total, torch.full((2, 3), 7.0))
    assert x.shape == (3, 2)
    total.sum().backward()
    assert torch.equal(factor.grad, torch.full((3,), 2.0))
    assert PAD % 16 == 0


def test_sleepy_streams_sleep_and_lose_nothing(monkeypatch, cuda):
    fake = FakeCuda(monkeypatch)
    expected = engine.in_place(1)
    for setting in (chain.Setting("stream", "refetch"), chain.Setting("host", zero_copy=True)):
        streams = SleepyStreams(CPU, seed=1)
        assert chain.difference(chain.trained(setting, CPU, streams), expected) == ""
        assert {streams.inbound.stream, streams.outbound.stream} <= {stream for stream, _ in fake.used}
    assert len(cuda) > 20
    assert len(set(cuda)) > 10
    careless = SleepyStreams(CPU, seed=1, careless=True)
    assert chain.difference(chain.trained(chain.Setting("stream"), CPU, careless), expected)


def test_settings_are_the_whole_grid():
    every = chain.settings()
    assert len({setting.title() for setting in every}) == len(every)
    assert (
        sum(setting.compute_dtype == "bfloat16" and setting.accumulation == 1 for setting in every)
        == 4 * 2 * 3 * 2 * 2 + 2
    )


def test_a_wrong_setting_and_one_without_time_are_told(told):
    tally, setting = engine.Tally(), chain.Setting("host")
    tally.add(setting, "")
    tally.skip(setting)
    assert tally.tell("")
    assert told()["host"]["holds"] is None  # some were not run
    tally.add(setting, "tensor 1 of 3: 2 of 4 values differ")
    assert not tally.tell("")
    found = told()["host"]
    assert found["holds"] is False
    assert "1/2 equal" in found["measured"]


def test_an_op_whose_process_dies_is_told(monkeypatch, told):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert not ops.apart(["row_union"], [], 5.0)
    assert told()["row_union"]["holds"] is False


# ---------------------------------------------------------------------------------------------------------- sanitizer


@pytest.mark.parametrize(("summary", "code", "clean"), [("0 errors", 0, True), ("3 errors", 9, False)])
def test_the_sanitizer_runs_the_ops_without_torchs_cache(monkeypatch, tmp_path, told, summary, code, clean):
    found = findings.MARK + json.dumps({"what": "row_union", "values": {"counts": {"all": [4, 4]}, "left": 0}})
    tool = tmp_path / "compute-sanitizer"
    lines = f"echo '{found}'\necho \"$@ cache $PYTORCH_NO_CUDA_MEMORY_CACHING\"\necho '== ERROR SUMMARY: {summary}'"
    tool.write_text(f"#!/bin/sh\n{lines}\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert sanitizer.run("memcheck", ("row_union",), 30.0) == clean
    assert told()["memcheck"]["holds"] == clean


# --------------------------------------------------------------------------------------------------------------- tier


def test_rows_that_stay_on_the_device_are_stepped_there_and_a_wrong_step_is_noticed(monkeypatch, told):
    assert "no row was stepped" in tier.wrong_of(tier.WithPlaces("stream", device_rows=0.0), CPU, True)
    assert not tier.wrong_of(tier.WithPlaces("stream"), CPU, True)
    tier.one_mode("float8", CPU, 8, 32)
    assert told()["rows stepped by the device, moments=float8"]["holds"] is True
    true, calls = tier.update_rows, iter(range(6))
    late = lambda *args, **fields: true(*args, **fields) if next(calls) < 5 else None  # noqa: E731
    monkeypatch.setattr(tier, "update_rows", late)
    tier.one_mode("float32", CPU, 8, 32)
    assert told()["rows stepped by the device, moments=float32"]["holds"] is False
