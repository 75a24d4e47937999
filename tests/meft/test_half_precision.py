"""Models in float16: products take 16-bit operands, as tensor cores do, and what they sum is float32."""

import pytest
import torch

import meft.retrieval.sparse_ffn
from adapter_kernels import sparse_ffn, sparse_ffn_backward
from meft.routing.reference import reference
from meft.routing.topk import select_neurons
from tests.support.thread_streams import on_streams
from tests.support.tiny_meft import STRATEGIES

HALF = torch.float16
EPS = 2.0**-11  # half a unit in the last place


def one_layer(tiny, dtype=HALF, **fields):
    model = tiny.adapted(layers=1, dtype=dtype, **fields)
    on_streams(model)
    return tiny.layers(model)[0]


def inputs(tiny, dtype=HALF, tokens=40):
    return torch.randn(2, tokens, tiny.WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_kernels_get_operands_in_16_bits(tiny, monkeypatch, strategy):
    """The base's: what is 16 bits wide by another choice of dtypes is not multiplied in it."""
    seen = {}

    def note(name, function):
        def noted(*args, **kwargs):
            seen.setdefault(name, set()).add(tuple(t.dtype for t in args[: 4 if "backward" in name else 3]))
            return function(*args, **kwargs)

        return noted

    monkeypatch.setattr(meft.retrieval.sparse_ffn, "sparse_ffn", note("forward", sparse_ffn))
    monkeypatch.setattr(meft.retrieval.sparse_ffn, "sparse_ffn_backward", note("backward", sparse_ffn_backward))
    for dtype, row_dtype, computed in (
        (HALF, "auto", HALF),
        (HALF, "bfloat16", torch.float32),
        (torch.bfloat16, "float16", torch.float32),
    ):
        seen.clear()
        x, g = inputs(tiny, dtype)
        one_layer(tiny, dtype, retrieval=strategy, row_dtype=row_dtype)(x.requires_grad_()).backward(g)
        assert seen == {"forward": {(computed,) * 3}, "backward": {(computed,) * 4}}


def test_picks_are_those_of_scores_in_float32(tiny, monkeypatch):
    """Scores past the range of float16 still have an order."""
    layer = one_layer(tiny, retrieval="stream")
    x, _ = inputs(tiny)
    with torch.no_grad():
        layer.router("default").mul_(1e6)
    picked = []

    def noted(*args, **kwargs):
        picked.append((args, select_neurons(*args, **kwargs)))
        return picked[-1][1]

    monkeypatch.setattr("meft.routing.topk.select_neurons", noted)
    layer(x)
    (((x, logits, keys, config, _), found),) = picked
    assert x.dtype == keys.dtype == HALF
    assert found.scores.dtype == torch.float32
    assert 65504 < float(found.scores.max()) < float("inf")
    assert torch.equal(select_neurons(x.double(), logits.double(), keys.double(), config).ids, found.ids)


def test_output_and_gradients_beside_the_oracle(tiny):
    """Rounded are: the output, the gradient of the input, and what goes between two products."""
    layer = one_layer(tiny, retrieval="stream")
    x, g = inputs(tiny)
    given = x.clone().requires_grad_()
    y = layer(given) - layer.base_layer(x)
    layer(given).backward(g)
    config = layer.configs["default"]
    rows = [table.rows.detach().to(HALF).double().requires_grad_() for table in layer.tables("default")]
    router, wide = layer.router("default").detach().double(), x.double().requires_grad_()
    expected = reference(wide, router, *rows, experts_per_token=config.probed, top_k=config.top_k)
    expected.backward(g.double())
    assert (y - expected).norm() < 4 * EPS * (expected.norm() + layer(x).norm())
    for table, row in zip(layer.tables("default"), rows, strict=True):
        gradient = table.rows.grad
        assert gradient.row_values.dtype == torch.float32
        assert (gradient.to_dense() - row.grad).norm() < 2 * EPS * row.grad.norm()


def test_sums_over_tokens_may_pass_the_range_of_float16(tiny):
    """As with bfloat16: each token's gradient is in range, their sum is not, and leaves in float32."""
    layer = one_layer(tiny, retrieval="host")
    x, g = inputs(tiny, tokens=400)
    layer(x.requires_grad_()).backward(g.mul_(8192).clamp_(-60000, 60000))
    largest = max(table.rows.grad.row_values.abs().max() for table in layer.tables("default"))
    assert 65504 < float(largest) < float("inf")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_overflow_under_a_scaler_costs_a_step_and_a_smaller_scale_trains(tiny, strategy):
    model = tiny.adapted(layers=2, dtype=HALF, retrieval=strategy)
    on_streams(model)
    optimizer, scaler = tiny.adamw(model), torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-28)
    before = tiny.state(model)
    for step in range(3):
        scaler.scale(tiny.loss(model, step)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if not step:
            tiny.assert_equal(tiny.state(model), before)
            assert scaler.get_scale() == 2.0**12
    after = tiny.state(model)
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(after[name], before[name]) for name in before)
