"""Two hundred runs with random delays at every hand-over: the same bits each time, and those of rows read in place."""

import gc
import threading
import time

import pytest
import torch

import meft
import meft.gradient.offload_ring
import meft.table.row_table
from tests.support.thread_streams import ThreadStreams
from tests.support.tiny_meft import STRATEGIES
from tests.support.training import integers

RUNS = 200  # in all


class LateStreams(ThreadStreams):
    """Some copies come at once and some late, so that the streams, the updates and the drains overtake each other."""

    def delay(self, name):
        return self.random.choice((0, 0, 0, self.longest)) * self.random.random()


def some_delay(streams):
    if streams.random.random() < 0.2:
        time.sleep(streams.longest * streams.random.random())


@pytest.fixture
def late(monkeypatch):
    """Updates and drains come late as well."""
    streams = [LateStreams()]
    drain = meft.gradient.offload_ring.GradientRing._drain

    def late_drain(self, *args):
        some_delay(streams[0])
        drain(self, *args)

    def late_update(state, rows, gradients, rule, seed, factors):
        """One step down the sign of the gradient: integers stay integers, as with AdamW's they would not."""
        some_delay(streams[0])
        state.counts[rows] += 1
        for x in (state.table, state.compute_copy):
            x[rows] -= gradients.sign().to(x.dtype)

    monkeypatch.setattr(meft.gradient.offload_ring.GradientRing, "_drain", late_drain)
    monkeypatch.setattr(meft.table.row_table, "update_rows", late_update)
    return streams


def run(tiny, model, start):
    """Two steps of two micro-batches from the same beginning; all tensors at the end, and the losses."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".meft_" in name:
                value.copy_(start[name])
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "router" in n], lr=2.0**-10)
    rows = meft.RowAdamW([t.rows for t in tiny.tables(model)], lr=0.5, betas=(0.5, 0.5), eps=1e-8)
    seen = []
    for step in range(2):
        for p in tiny.trainable(model):
            p.grad = None
        for micro in range(2):
            x = torch.randint(-2, 3, (2, 3, tiny.WIDTH), generator=torch.Generator().manual_seed(2 * step + micro))
            out = forward(tiny, model, x.double())
            (out * weights(out)).sum().backward()
            seen.append(out.detach())
        seen += tiny.gradients(model).values()
        rows.step()
        optimizer.step()
    return [*seen, *tiny.whole_state(model).values()]


def weights(out):
    """Small integers that depend on nothing."""
    return torch.arange(out.numel()).reshape(out.shape).remainder(5).double() - 2


def forward(tiny, model, x):
    """The adapted FFNs one after the other, with integers between -2 and 2 plus those of x: all of it exact."""
    y = x
    for layer in tiny.layers(model):
        y = layer(y).remainder(4) - 2 + x
    return y


def build(tiny, **fields):
    model = tiny.adapted(layers=3, row_dtype="float32", **fields)
    integers(model)
    for layer in tiny.layers(model):
        layer.base_layer.register_forward_hook(lambda module, args, output: args[0])  # nothing is rounded there
    return model


@pytest.mark.parametrize("rows", ["save", "refetch"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_bits_in_every_run(tiny, late, strategy, rows):
    plain = build(tiny)
    start = {n: p.detach().clone() for n, p in plain.named_parameters() if ".meft_" in n}
    expected = run(tiny, plain, start)
    model = build(tiny, retrieval=strategy, backward_rows=rows)
    gc.collect()
    before = sum("meft" in thread.name for thread in threading.enumerate())
    began = time.monotonic()
    for seed in range(RUNS // 8):
        streams = late[0] = LateStreams(seed, longest=1e-3)
        model.base_model.engines["default"].use(streams)
        found = run(tiny, model, start)
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs)
        streams.close()
    assert time.monotonic() - began < 60
    gc.collect()
    # The threads of engines and streams that are gone are too.
    assert sum("meft" in thread.name for thread in threading.enumerate()) <= before + 3
