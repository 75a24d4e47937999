import json

import pytest
import torch

from meft.routing.reference import chosen_neurons


def test_the_counters_of_one_step(tiny):
    """Beside counts made here from the picks of the oracle."""
    model = tiny.adapted(layers=1, dtype=torch.float32)
    inputs, layer = [], tiny.layers(model)[0]
    layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    tiny.loss(model).backward()
    config, x = layer.configs["default"], inputs[0].reshape(-1, tiny.WIDTH)
    keys = layer.tables("default")[0]
    chosen = chosen_neurons(
        x,
        layer.router("default").detach(),
        keys.rows.detach(),
        experts_per_token=config.experts_per_token,
        top_k=config.top_k,
        router_factor=True,
    )
    used = int(chosen.any(0).sum())
    traffic = layer.traffic["default"]
    assert (traffic.forwards, traffic.tokens, traffic.union_rows) == (1, len(x), used)
    assert torch.equal(traffic.expert_load, chosen.sum(0).view(config.experts, -1).sum(1))
    assert traffic.bytes_to_device == traffic.bytes_to_host == 0  # rows are read where they are


def test_sums_and_means_over_layers(tiny):
    model = tiny.adapted(layers=2)
    empty = model.base_model.transfer_report()
    assert (empty.union_share, empty.busiest_expert_share, empty.idle_expert_share) == (0, 0, 0)
    for seed in range(2):
        tiny.loss(model, seed).backward()
    report = model.base_model.transfer_report()
    layers = list(report.layers.values())
    summed = report.to_dict()
    assert summed["forwards"] == 4
    assert summed["bytes_to_host"] == sum(layer.bytes_to_host for layer in layers)
    assert report.union_share == pytest.approx(sum(layer.union_rows for layer in layers) / (4 * tiny.R))
    assert 1 <= report.busiest_expert_share <= 8
    assert 0 <= report.idle_expert_share < 1
    assert json.loads(json.dumps(summed)) == summed
    assert f"{report.union_share:.3f}" in str(report)


def test_rows_on_the_device_cross_nothing(tiny):
    model = tiny.adapted(placement="device")
    tiny.loss(model).backward()
    report = model.base_model.transfer_report().to_dict()
    assert (report["bytes_to_device"], report["bytes_to_host"]) == (0, 0)
    assert report["union_rows"] > 0


def test_an_unknown_adapter_is_an_error(tiny):
    with pytest.raises(ValueError, match="adapter_name='other'"):
        tiny.adapted().base_model.transfer_report("other")


def test_a_trainers_logs_hold_what_came_since_the_last_one(tiny):
    model = tiny.adapted(layers=2).base_model
    assert model.log_scalars()["meft/mib_to_device"] == 0
    tiny.loss(model).backward()
    first = model.log_scalars()
    assert first["meft/union_share"] == pytest.approx(model.transfer_report().union_share)
    assert first["meft/mib_to_host"] * 2**20 == model.transfer_report().to_dict()["bytes_to_host"]
    assert model.log_scalars()["meft/mib_to_host"] == 0
