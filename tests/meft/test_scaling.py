"""Extrapolation of a trained adapter: `record_rows` and `scale_values`."""

import pytest
import torch
from peft import PeftModel

import meft
from meft.retrieval import engine_setup
from meft.routing.reference import chosen_neurons
from meft.transport.streams import HostStreams
from tests.support.tiny_meft import STRATEGIES, Tiny


def logits(model, seed=0):
    with torch.no_grad():
        return model.eval()(input_ids=Tiny.batch(seed=seed)).logits


def test_a_factor_of_one_changes_no_bit_and_zero_gives_the_base_model():
    model = Tiny.adapted()
    state, trained = Tiny.state(model), logits(model)
    meft.scale_values(model, 1)
    Tiny.assert_equal(Tiny.state(model), state)
    meft.scale_values(model, 0.0)
    assert torch.equal(logits(model), logits(Tiny.base()))
    assert not torch.equal(logits(model), trained)


@pytest.mark.parametrize("factor", [2.0, 0.5, -1.0])
def test_each_layer_adds_that_multiple_with_the_same_picks(factor):
    """Powers of two: bit for bit."""
    model, x = Tiny.adapted(), torch.randn(3, 4, Tiny.WIDTH, dtype=torch.float64)
    layers = Tiny.layers(model)
    with torch.no_grad():
        # The part alone: an FFN of zeros.
        for layer in layers:
            layer.base_layer.down_proj.weight.zero_()
        before = [layer(x) for layer in layers]
        meft.scale_values(model, factor)
        for layer, added in zip(layers, before, strict=True):
            assert torch.equal(layer(x), factor * added)
            assert added.abs().max() > 0


def test_only_the_rows_that_the_data_uses_change():
    model = Tiny.adapted()
    with meft.record_rows(model) as rows:
        logits(model, seed=1)
        logits(model, seed=2)
    seen = logits(model, seed=1)
    state = Tiny.state(model)
    assert len(rows) == 2
    meft.scale_values(model, 0.0, rows=rows)
    for path, used in rows.items():
        assert 0 < used.sum() < Tiny.R
        name = f"{path}.meft_values.default.rows"
        now = model.state_dict()[name]
        assert torch.equal(now[~used], state.pop(name)[~used])
        assert (now[used] == 0).all()
    Tiny.assert_equal({name: value for name, value in Tiny.state(model).items() if name in state}, state)
    assert not torch.equal(logits(model, seed=1), seen)


def test_without_the_rows_that_it_uses_the_data_gets_the_base_model():
    model = Tiny.adapted(1)
    with meft.record_rows(model) as rows:
        logits(model, seed=1)
    meft.scale_values(model, 0.0, rows=rows)
    assert torch.equal(logits(model, seed=1), logits(Tiny.base(1), seed=1))
    assert not torch.equal(logits(model, seed=2), logits(Tiny.base(1), seed=2))


def test_what_is_recorded_is_what_the_oracle_picks():
    model, x = Tiny.adapted(1), torch.randn(5, Tiny.WIDTH, dtype=torch.float64)
    (layer,) = Tiny.layers(model)
    keys, _ = layer.tables("default")
    config = layer.configs["default"]
    options = {"experts_per_token": config.probed, "top_k": config.top_k, "router_factor": config.router_factor}
    wanted = chosen_neurons(x, layer.router("default").detach(), keys.rows.detach(), **options)
    with meft.record_rows(model) as outer:
        layer(x[:2])
        with meft.record_rows(model) as inner:
            layer(x[2:])
    assert [value.tolist() for value in inner.values()] == [wanted[2:].any(0).tolist()]
    assert [value.tolist() for value in outer.values()] == [wanted.any(0).tolist()]
    layer(torch.randn(50, Tiny.WIDTH, dtype=torch.float64))  # recorded no more
    assert [value.tolist() for value in outer.values()] == [wanted.any(0).tolist()]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_strategy_records_and_sees_the_new_values(strategy, monkeypatch):
    monkeypatch.setattr(engine_setup, "streams_of", HostStreams)
    model = Tiny.adapted(retrieval=strategy)
    for engine in model.base_model.engines.values():
        engine.use(HostStreams(torch.device("cpu")))
    plain = Tiny.adapted()
    with meft.record_rows(model) as rows, meft.record_rows(plain) as expected:
        logits(model)
        logits(plain)
    Tiny.assert_equal(rows, expected)
    for one in (model, plain):
        meft.scale_values(one, -0.5, rows=expected)
    assert (logits(model) - logits(plain)).abs().max() < 1e-12


def test_a_scaled_adapter_is_saved_and_loaded(tmp_path):
    model = Tiny.adapted(dtype=torch.float32)
    meft.scale_values(model, 1.5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Tiny.base(dtype=torch.float32), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), logits(Tiny.adapted(dtype=torch.float32)))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"factor": float("nan")}, "factor=nan must be a finite number"),
        ({"factor": 2, "adapter_name": "other"}, "adapter_name='other' is no MEFT adapter"),
        ({"factor": 2, "rows": {"somewhere": torch.ones(Tiny.R, dtype=torch.bool)}}, "'somewhere' is no FFN"),
        ({"factor": 2, "rows": {"0": torch.ones(3)}}, r"torch.float32 of shape \(3,\).* shape \(48,\) is needed"),
    ],
)
def test_what_does_not_fit_changes_nothing(arguments, match):
    model = Tiny.adapted()
    state = Tiny.state(model)
    rows = arguments.get("rows", {})
    if "0" in rows:
        path = next(path for path, _ in model.named_modules() if path.endswith("layers.1.mlp"))
        first = next(path for path, _ in model.named_modules() if path.endswith("layers.0.mlp"))
        arguments = arguments | {"rows": {first: torch.ones(Tiny.R, dtype=torch.bool), path: rows["0"]}}
    with pytest.raises(ValueError, match=match):
        meft.scale_values(model, **arguments)
    Tiny.assert_equal(Tiny.state(model), state)
