"""Training by each strategy on a device against rows that are read in place: bit for bit, for all values are whole.

On the CPU a stand-in for `torch.cuda` is under the real streams, whose streams are as late as they can be.
"""

import random

import pytest
import torch

from benchmarks.device.chain import (
    STRATEGIES,
    Setting,
    adapted,
    difference,
    end,
    settings,
    stepping,
    train,
    trained,
    use,
)
from benchmarks.device.engine import in_place, streams_maker
from meft.transport.transfer import bring_rows, page_locked
from tests.support.kernels.row_checks import same_bits, table


@pytest.fixture(scope="module", autouse=True)
def expected():
    """By the number of micro-batches; made before anything stands in for `torch.cuda`."""
    return {accumulation: in_place(accumulation) for accumulation in (1, 2)}


@pytest.mark.parametrize("setting", settings(), ids=Setting.title)
def test_training_equals_that_with_rows_in_place(device, streams, expected, setting):
    assert difference(trained(setting, device, streams), expected[setting.accumulation]) == ""


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_streams_that_sleep_change_no_bit(device, expected, strategy):
    make = streams_maker(device, device.type == "cpu")
    for seed in range(10 if device.type == "cuda" else 2):
        setting = random.Random(seed).choice([each for each in settings() if each.strategy == strategy])
        wrong = difference(trained(setting, device, make(seed, False)), expected[setting.accumulation])
        assert wrong == "", f"{setting.title()}, seed {seed}: {wrong}"


def test_a_hand_over_that_is_left_out_shows(device, expected):
    make = streams_maker(device, device.type == "cpu")
    assert any(difference(trained(Setting("stream"), device, make(seed, True)), expected[1]) for seed in range(5))


def test_steps_are_taken_by_the_device(device, streams):
    """Equal bits do not tell: where the device does not reach the rows, the host steps them."""
    setting = Setting("stream", zero_copy=True)
    model = use(adapted(setting).to(device), streams)
    train(model, stepping(model), setting, range(1))
    end(model)
    assert model.base_model.transfer_report().to_dict()["bytes_zero_copy"] > 0


@pytest.mark.parametrize("width", [40, 7, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_come_out_of_page_locked_memory(device, dtype, width):
    form, locked = ((50, width), dtype), device.type == "cuda"
    tables = [page_locked(*form, device) if locked else torch.empty(form[0], dtype=dtype) for _ in range(2)]
    for seed, one in enumerate(tables):
        one.copy_(table(50, width, dtype, seed).nan_to_num())
        assert one.is_pinned() == locked
    ids = torch.randperm(50, generator=torch.Generator().manual_seed(0))[:37].sort().values
    out = [torch.full((37, width), torch.nan, dtype=dtype, device=device) for _ in tables]
    bring_rows(ids.to(device, torch.int32), ids, tables, out)
    for found, one in zip(out, tables, strict=True):
        assert same_bits(found.cpu(), one[ids])
