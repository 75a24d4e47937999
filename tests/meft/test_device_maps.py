"""Models whose layers are on two GPUs, by accelerate's hooks: rows go to the device of their layer.

The GPUs are stand-ins, whose operations on tensors of two devices fail and whose copies come late
(`tests/support/two_gpus.py`). What is trained equals, bit for bit, what one such GPU trains.
"""

import copy

import pytest
import torch
from accelerate import dispatch_model
from peft import PeftModel, get_peft_model

from tests.support.two_gpus import two_gpus

FIRST, SECOND = "cuda:0", "cuda:1"
LAYERS = [FIRST, SECOND, FIRST]
ENDS = {"model.embed_tokens": FIRST, "model.rotary_emb": FIRST, "model.norm": SECOND, "lm_head": SECOND}
FIELDS = {"master_dtype": "float64", "init_weights": False}


@pytest.fixture(autouse=True)
def streams(monkeypatch):
    """Device -> the streams that were made for it."""
    with two_gpus(monkeypatch) as made:
        yield made


def spread(base, layers=LAYERS):
    """As by `from_pretrained(device_map="auto")`."""
    where = ENDS | {f"model.layers.{i}": place for i, place in enumerate(layers)}
    return dispatch_model(base, where, main_device=FIRST, force_hooks=True)


def adapted(tiny, base, **fields):
    torch.manual_seed(7)
    model = get_peft_model(base, tiny.config(**(FIELDS | fields)))
    tiny.enlarge(model)
    return model


def of_one_gpu(tiny, **fields):
    return adapted(tiny, tiny.base(len(LAYERS)).to(FIRST), **fields)


def of_two(tiny, **fields):
    return adapted(tiny, spread(tiny.base(len(LAYERS))), **fields)


def train(tiny, model, steps=2, plain=False):
    """Two micro-batches a step and clipping, unless it is plain."""
    optimizer = tiny.adamw(model)
    for step in range(steps):
        for seed in range(2 * step, 2 * step + (1 if plain else 2)):
            batch = tiny.batch(seed=seed).to(FIRST)
            model(input_ids=batch, labels=batch).loss.backward()
        if not plain:
            torch.nn.utils.clip_grad_norm_(tiny.trainable(model), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    return model


def state(tiny, model):
    return {name: value.cpu() for name, value in tiny.whole_state(model).items()}


@torch.no_grad()
def logits(tiny, model, place=FIRST):
    return model(input_ids=tiny.batch().to(place)).logits.cpu()


@pytest.mark.parametrize(
    "fields",
    [
        {"retrieval": "host"},
        {"retrieval": "stream", "backward_rows": "refetch"},
        {"retrieval": "device-rows", "row_optimizer": {"in_backward": True}},
    ],
    ids=str,
)
def test_rows_are_trained_as_on_one_gpu_and_cross_no_more_often(tiny, streams, fields):
    plain = "row_optimizer" in fields
    one, two = (train(tiny, make(tiny, **fields), plain=plain) for make in (of_one_gpu, of_two))
    tiny.assert_equal(state(tiny, two), state(tiny, one))
    assert torch.equal(logits(tiny, two), logits(tiny, one))
    moved = [model.base_model.transfer_report() for model in (one, two)]
    assert moved[0].strategy == moved[1].strategy == fields["retrieval"]
    assert moved[0].totals()["bytes_to_device"] >= moved[1].totals()["bytes_to_device"] > 0  # two have more buffers
    assert {str(device): len(made) for device, made in streams.items()} == {FIRST: 2, SECOND: 1}


def test_checkpointed_layers_gather_their_rows_again(tiny):
    def trained(make):
        model = make(tiny, retrieval="stream", backward_rows="refetch").train()
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        return state(tiny, train(tiny, model, steps=1))

    tiny.assert_equal(trained(of_two), trained(of_one_gpu))


def test_an_offloaded_layer_is_of_the_device_that_computes_it(tiny, streams):
    expected = logits(tiny, train(tiny, of_one_gpu(tiny, retrieval="device-rows"), 1))
    model = adapted(tiny, spread(tiny.base(len(LAYERS)), ["cpu", SECOND, FIRST]), retrieval="device-rows")
    assert torch.equal(logits(tiny, train(tiny, model, 1)), expected)
    assert {str(device): len(made) for device, made in streams.items()} == {FIRST: 2, SECOND: 1}


def test_a_model_may_move_and_be_copied_and_loaded(tiny, streams, tmp_path):
    model = train(tiny, of_two(tiny, retrieval="device-rows"), 1)
    expected = logits(tiny, model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(tiny, copy.deepcopy(model)), expected)
    loaded = PeftModel.from_pretrained(spread(tiny.base(len(LAYERS))), tmp_path)
    assert torch.equal(logits(tiny, loaded), expected)
    one = PeftModel.from_pretrained(tiny.base(len(LAYERS)), tmp_path)
    streams.clear()
    for place in (SECOND, FIRST):
        one.to(place)
        assert torch.equal(logits(tiny, one, place), expected)
    assert {str(device): len(made) for device, made in streams.items()} == {FIRST: 1, SECOND: 1}


def test_each_gpu_has_a_plan_for_its_layers(tiny, monkeypatch):
    model, asked = of_two(tiny), []

    def choose(config, widths, x):
        asked.append((len(widths), str(x.device)))
        return ("device-rows", "save") if x.device == torch.device(FIRST) else ("stream", "save")

    model.base_model.engines["default"].choose = choose
    monkeypatch.setattr("meft.retrieval.engine_setup.out_of_memory_errors", lambda device: 0)
    monkeypatch.setattr("meft.retrieval.engine.out_of_memory_errors", lambda device: 0)
    for _ in range(2):
        logits(tiny, model)
    assert asked == [(2, FIRST), (1, SECOND)]
    assert model.base_model.transfer_report().strategy == "device-rows, stream"
