"""Which strategy `retrieval="auto"` takes: the first that fits, or the fastest by what was measured."""

import logging

import pytest
import torch

from meft import MEFTConfig
from meft.cost import auto
from meft.cost.auto import choose, model_profile
from meft.cost.calibration import Calibration
from meft.cost.memory import AdapterShape, Plan, Work
from meft.cost.step_time import BaseModel, Ceilings
from meft.injection import profile_of
from meft.retrieval.engine import out_of_memory_errors

GIB = 2**30
BASE = BaseModel(256, 4 * 4096**2, 3 * 4096 * 11008, 4096, 32000 * 4096)
FAST = Ceilings(1e14, 1e12, 25e9, 25e9, 50e9, 50e9, 1e12)
SHAPE = {"d": 4096, "layers": 32, "base_dtype": torch.bfloat16}


def config(**fields):
    return MEFTConfig(r=6400, row_dtype="bfloat16", **fields)


def chosen(free, given=None, calibration=None, tokens=512):
    given = given or config()
    widths = [4096] * 32
    around = auto.ModelProfile(BASE, lambda tokens: 0)
    return choose(given, widths, torch.empty(tokens, 4096, dtype=torch.bfloat16), around, free, calibration)


def size(strategy, rows, tokens=512):
    shape = AdapterShape.of(config(), **SHAPE)
    return sum(Plan(shape, Work(tokens, 6400, rows=rows), strategy).device_bytes().values())


@pytest.mark.parametrize("strategy", ["device-rows", "device-keys", "stream", "host"])
def test_without_a_calibration_the_first_that_fits_is_taken(strategy):
    needed = min(size(strategy, rows) for rows in ("save", "refetch"))
    plan = chosen(needed)
    assert sum(plan.device_bytes().values()) <= needed
    order = ["device-rows", "device-keys", "stream", "host"]
    assert order.index(plan.strategy) <= order.index(strategy)
    smaller = [min(size(s, rows) for rows in ("save", "refetch")) for s in order[: order.index(plan.strategy)]]
    assert all(needed < other for other in smaller)  # nothing before it would have fitted


def test_rows_are_saved_where_that_fits_and_else_fetched_again():
    assert chosen(size("stream", "save")).work.rows == "save"
    plan = chosen(size("stream", "refetch"))
    assert plan.work.rows == "refetch"
    assert chosen(80 * GIB, config(backward_rows="refetch")).work.rows == "refetch"


def test_what_does_not_fit_at_all_takes_the_least_and_says_so(caplog):
    with caplog.at_level(logging.WARNING, logger="meft.cost.auto"):
        plan = chosen(GIB // 8)
    assert (plan.strategy, plan.work.rows) == ("host", "refetch")
    assert "0.12 GiB" in caplog.text
    assert "use a smaller batch or r" in caplog.text


def test_activations_are_left_room():
    widths = [4096] * 32
    around = auto.ModelProfile(BASE, lambda tokens: tokens * GIB // 512)
    free = size("device-rows", "save")
    x = torch.empty(512, 4096, dtype=torch.bfloat16)
    assert choose(config(), widths, x, around, free + GIB, None).strategy == "device-rows"
    assert choose(config(), widths, x, around, free + GIB - 1, None).strategy != "device-rows"


def test_with_a_calibration_the_fastest_of_those_that_fit_is_taken():
    slow_link = Ceilings(1e14, 1e12, 1e8, 1e8, 2e8, 50e9, 1e15)
    contended = Calibration("here", FAST, slow_link)
    room = min(size("device-keys", rows) for rows in ("save", "refetch")) - 1
    # Over a slow link, beside a host that picks in no time, streaming whole key tables loses.
    assert chosen(room, calibration=contended).strategy == "host"
    slow_host = Ceilings(1e14, 1e12, 25e9, 25e9, 50e9, 50e9, 1e8)
    assert chosen(room, calibration=Calibration("here", FAST, slow_host)).strategy == "stream"


def test_what_an_engine_knows_of_its_model(tiny):
    model = tiny.adapted(layers=3, dtype=torch.float32)
    own = {id(m) for layer in tiny.layers(model) for m in layer.meft_keys.modules()}
    own |= {id(m) for layer in tiny.layers(model) for m in layer.meft_values.modules()}
    own |= {id(layer) for layer in tiny.layers(model)}
    ffns = [layer.base_layer for layer in tiny.layers(model)]
    base = model_profile(model.base_model.model, ffns, lambda m: id(m) in own).base
    assert base.ffn == 3 * 32 * 64
    assert base.head == 64 * 32
    assert base.weight_bytes == 4
    attention = 32 * 32 * 2 + 2 * 32 * 16  # q, o, and k, v of one head of two
    assert attention <= base.attention <= attention + 3 * 32 + 8 * 32  # norms, and the router
    assert profile_of(model.base_model.model, tiny.layers(model)).base == base


def test_an_engine_on_the_cpu_with_auto_reads_in_place(tiny):
    model = tiny.adapted()
    tiny.loss(model).backward()
    assert model.base_model.transfer_report().strategy is None


def test_a_device_without_the_memory_to_be_measured_gets_what_moves_least(monkeypatch, caplog):
    def full(device):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(auto, "calibrated", full)
    monkeypatch.setattr(auto, "free_bytes", lambda device: 10**15)
    widths = [4096] * 32
    plan = auto.chosen(config(), widths, torch.empty(512, 4096, dtype=torch.bfloat16), None)
    assert plan == chosen(10**15)
    assert "no memory left to be measured in" in caplog.text


def test_each_plan_reads_the_memory_that_is_free_then(monkeypatch):
    monkeypatch.setattr(auto, "calibrated", lambda device: None)
    widths = [4096] * 32
    x, found = torch.empty(512, 4096, dtype=torch.bfloat16), []
    for free in (10**15, 1):
        monkeypatch.setattr(auto, "free_bytes", lambda device, free=free: free)
        found.append(auto.chosen(config(), widths, x, None).strategy)
    assert found == ["device-rows", "host"]


def test_errors_for_want_of_memory_are_counted_by_the_allocator(monkeypatch):
    stats = {"num_ooms": 3}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: stats)
    assert out_of_memory_errors(torch.device("cuda", 0)) == 3
    stats.clear()  # a backend of the allocator that does not count
    assert out_of_memory_errors(torch.device("cuda", 0)) == 0
