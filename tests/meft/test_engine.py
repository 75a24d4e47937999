"""The engine on the CPU, with threads for streams: the same results whichever way the rows take."""

from types import SimpleNamespace

import pytest
import torch
from torch._C._profiler import _ExperimentalConfig

import meft.retrieval.engine
import meft.retrieval.strategies.resident
from meft.routing.reference import reference
from meft.transport.streams import HostStreams
from tests.support.thread_streams import on_streams
from tests.support.tiny_meft import ROWS, STRATEGIES


def pair(tiny, dtype=torch.float64, layers=3, **fields):
    """The same model twice: rows read in place, and with an engine."""
    plain = tiny.adapted(layers=layers, dtype=dtype)
    engine = tiny.adapted(layers=layers, dtype=dtype, **fields)
    tiny.assert_equal(tiny.state(engine), tiny.state(plain))
    return plain, engine


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_training_equals_that_with_rows_in_place(tiny, strategy, rows):
    plain, ours = pair(tiny, retrieval=strategy, backward_rows=rows)
    streams = on_streams(ours, longest=2e-3)
    for model in (plain, ours):
        optimizer = tiny.adamw(model)
        losses = []
        for step in range(4):
            optimizer.zero_grad()
            for micro in range(2):
                loss = tiny.loss(model, 2 * step + micro) / 2
                loss.backward()
                losses.append(float(loss))
            torch.nn.utils.clip_grad_norm_(tiny.trainable(model), 0.5)
            optimizer.step()
        model.losses = losses
    assert min(streams.numbers["inbound"], streams.numbers["outbound"]) > 0
    assert ours.losses == pytest.approx(plain.losses, rel=1e-10)
    ours_state, plain_state = tiny.whole_state(ours), tiny.whole_state(plain)
    assert ours_state.keys() == plain_state.keys()
    for name, value in plain_state.items():
        torch.testing.assert_close(ours_state[name], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_experts_load_is_that_with_rows_in_place(tiny, strategy):
    plain, ours = pair(tiny, retrieval=strategy)
    on_streams(ours)
    reports = []
    for model in (plain, ours):
        tiny.loss(model).backward()
        reports.append(model.base_model.transfer_report())
    for path, traffic in reports[0].layers.items():
        assert torch.equal(traffic.expert_load, reports[1].layers[path].expert_load)
    assert reports[1].to_dict()["strategy"] == strategy
    assert strategy in str(reports[1])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_a_pass_without_autograd_has_made_serves_training(tiny, strategy):
    """Buffers that were made in inference mode cannot be written outside of it."""
    plain, ours = pair(tiny, retrieval=strategy)
    on_streams(ours)
    with torch.inference_mode():
        tiny.loss(ours)
    for model in (plain, ours):
        tiny.train(model, 2)
    for name, value in tiny.state(plain).items():
        torch.testing.assert_close(tiny.state(ours)[name], value, rtol=1e-8, atol=1e-10)


def error_of_row_gradients(tiny, **fields):
    """The largest and the least, in norm, of keys and values of one layer in bfloat16, and what has crossed."""
    model = tiny.adapted(layers=1, dtype=torch.bfloat16, **fields)
    on_streams(model)
    (layer,) = tiny.layers(model)
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(2, 40, tiny.WIDTH, generator=generator).bfloat16()
    layer(x.requires_grad_()).backward(g)
    config, traffic = layer.configs["default"], layer.traffic["default"]
    rows = [table.rows.detach().bfloat16().double().requires_grad_() for table in layer.tables("default")]
    router = layer.router("default").detach().double()
    picks = {"experts_per_token": config.probed, "top_k": config.top_k}
    reference(x.detach().double(), router, *rows, **picks).backward(g.double())
    found = [table.rows.grad for table in layer.tables("default")]
    for gradient, row in zip(found, rows, strict=True):
        assert torch.equal(gradient.rows, row.grad.any(1).nonzero()[:, 0])
        assert gradient.row_values.dtype == torch.float32
    errors = [(a.to_dense() - b.grad).norm() / b.grad.norm() for a, b in zip(found, rows, strict=True)]
    return float(max(errors)), float(min(errors)), traffic


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    "way", [{"retrieval": s} for s in STRATEGIES] + [{"placement": "device"}], ids=[*STRATEGIES, "resident"]
)
def test_row_gradients_in_float32_were_never_rounded_to_bfloat16(tiny, way, rows):
    most, _, wide = error_of_row_gradients(tiny, gradient_dtype="float32", backward_rows=rows, **way)
    _, least, narrow = error_of_row_gradients(tiny, backward_rows=rows, **way)
    assert most < 1e-6
    assert least > 1e-3
    crossed = 2 * 2 * wide.union_rows * tiny.WIDTH if "retrieval" in way else 0  # two bytes more a value
    assert wide.bytes_to_host - narrow.bytes_to_host == crossed


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_row_gradients_in_float32_are_those_of_a_checkpointed_layer(tiny, rows, reentrant):
    fields = {"dtype": torch.bfloat16, "retrieval": "stream", "gradient_dtype": "float32", "backward_rows": rows}
    found = []
    for checkpointed in (False, True):
        model = tiny.adapted(**fields)
        on_streams(model)
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
        loss = tiny.loss(model)
        loss.backward(retain_graph=not checkpointed)
        found.append(tiny.gradients(model))
        if not checkpointed:
            loss.backward()
            twice = tiny.gradients(model)
    tiny.assert_equal(found[1], found[0])
    for name, gradient in found[0].items():
        assert torch.equal(twice[name], 2 * gradient)
        assert "router" in name or not torch.equal(gradient, gradient.bfloat16().float())


@pytest.mark.parametrize("reason", ["more tokens", "no memory"])
def test_auto_plans_again_when_more_tokens_come_and_when_memory_ran_out(tiny, monkeypatch, reason):
    _, ours = pair(tiny, retrieval="auto")
    on_streams(ours)
    errors = 1
    monkeypatch.setattr(meft.retrieval.engine, "out_of_memory_errors", lambda device: errors)
    tiny.loss(ours, length=4)
    engine = ours.base_model.engines["default"]
    first = engine._strategy
    engine._planned_for = 8, 1  # as on a GPU
    tiny.loss(ours, length=3).backward()
    assert engine._strategy is first
    if reason == "no memory":
        errors = 2
    tiny.loss(ours, length=3 if reason == "no memory" else 5)
    assert engine._strategy is not first
    assert engine.strategy_name == "host"


def captured(monkeypatch):
    for module in (meft.retrieval.engine, meft.retrieval.strategies.resident):
        monkeypatch.setattr(module, "capturing", lambda x: True)


def test_a_captured_pass_over_rows_on_the_device_equals_another(tiny, monkeypatch):
    plain, ours = pair(tiny, placement="device")
    on_streams(ours)
    captured(monkeypatch)
    with torch.no_grad():
        torch.testing.assert_close(tiny.loss(ours), tiny.loss(plain), rtol=1e-12, atol=0)
    assert ours.base_model.transfer_report().union_share == 1  # nothing has looked how many there are


@pytest.mark.parametrize("fields", [{"retrieval": "stream"}])
def test_other_passes_are_not_captured(tiny, monkeypatch, fields):
    _, ours = pair(tiny, **fields)
    on_streams(ours)
    captured(monkeypatch)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"CUDA graph.*placement='device'"):
        tiny.loss(ours)


def test_training_is_not_captured(tiny, monkeypatch):
    _, ours = pair(tiny, placement="device")
    on_streams(ours)
    captured(monkeypatch)
    with pytest.raises(RuntimeError, match=r"under torch\.no_grad"):
        tiny.loss(ours)


PHASES = {"select", "gather rows", "sparse FFN", "row gradients", "drain row gradients", "update rows"}
OWN_PHASES = {
    "host": {"pick on the host"},
    "stream": {"bring keys"},
    "device-keys": {"bring changed rows"},
    "device-rows": {"bring changed rows"},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_profile_names_the_phases(tiny, strategy):
    model = tiny.adapted(layers=2, retrieval=strategy, backward_rows="refetch")
    on_streams(model)
    optimizer = tiny.train(model, 1)
    with torch.profiler.profile(experimental_config=_ExperimentalConfig(profile_all_threads=True)) as profile:
        tiny.train(model, 2, optimizer)
        for table in tiny.tables(model):
            table.synchronize()
    named = {event.key.removeprefix("meft: ") for event in profile.key_averages() if event.key.startswith("meft: ")}
    assert named == PHASES | OWN_PHASES[strategy] | {"gather rows again"}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("grad", [True, False])
def test_an_ffn_that_writes_into_its_input_is_an_error(tiny, strategy, grad):
    """Rows in place are computed with before; an engine ends after the FFN."""
    model = tiny.adapted(1, dtype=torch.float32, retrieval=strategy)
    model.base_model.engines["default"].use(HostStreams(torch.device("cpu")))
    tiny.layers(model)[0].base_layer.register_forward_pre_hook(lambda module, args: (args[0].mul_(0.5), None)[1])
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="writes into its own input"):
        tiny.loss(model)


@pytest.mark.parametrize("row_dtype", ["bfloat16", "float32"])
def test_a_layer_on_the_cpu_takes_no_part_in_the_streams_of_others(tiny, row_dtype):
    """Of an adapter whose other layers are on a device: its copies of rows are made, and kept, where they are."""
    fields = {"dtype": torch.float32, "row_dtype": row_dtype}
    plain, ours = tiny.adapted(**fields), tiny.adapted(**fields)
    engine = ours.base_model.engines["default"]
    others = SimpleNamespace(begin_pass=lambda: None)  # nothing else can be asked of it
    engine._plan, engine.streams, engine._strategy = ("host", "refetch"), object(), others
    for model in (plain, ours):
        tiny.loss(model).backward()
    tiny.assert_equal(tiny.gradients(ours), tiny.gradients(plain))
