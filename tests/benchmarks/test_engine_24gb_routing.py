"""The 24 GB benchmark's routing: forced shares, draws from the recording, and the recording itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model

import meft.routing.topk
from adapter_kernels import expert_topk
from benchmarks.card_24gb import models, plan, routing
from benchmarks.step_bound import record_routing as record
from meft import MEFTConfig

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------------------------------------ routing


@settings(max_examples=60, deadline=None)
@given(
    T=st.integers(1, 60), K=st.integers(1, 16), r=st.integers(1, 300), part=st.floats(0.001, 1), seed=st.integers(0, 9)
)
def test_forced_ids(T, K, r, part, seed):
    """Exactly the subset, distinct within a token, the same each time."""
    size = max(1, round(part * r))
    ids = routing.forced_ids(T, K, r, size, seed)
    assert ids.shape == (T, K)
    assert torch.equal(ids, routing.forced_ids(T, K, r, size, seed))
    used = ids[ids >= 0]
    assert int(used.max()) < r
    assert all(len(set(row)) == min(K, size) for row in (line[line >= 0].tolist() for line in ids))
    assert len(used.unique()) == min(size, T * min(K, size))


@pytest.mark.parametrize("size", [0, 11])
def test_a_subset_that_is_none(size):
    with pytest.raises(ValueError, match="size"):
        routing.forced_ids(4, 2, 10, size, 0)


def test_own_picks_are_made_and_replaced(monkeypatch):
    asked = []
    monkeypatch.setattr(routing, "expert_topk", lambda *args, **more: asked.append(args) or expert_topk(*args, **more))
    original, config = meft.routing.topk.select_neurons, MEFTConfig(r=8, num_experts=4, experts_per_token=2, top_k=2)
    ids = routing.Routing("0.5").ids(8, 3, 1, 4)
    load = torch.zeros(4, dtype=torch.int64)
    with routing.forced_picks(ids, routing.SUBSETS, 4, 2):
        picked = [
            meft.routing.topk.select_neurons(torch.ones(4, 3), torch.ones(4, 4), torch.ones(8, 3), config, load)
            for _ in range(routing.SUBSETS + 1)
        ]
    found = [one.ids for one in picked]
    assert len(asked) == len(picked)
    assert int(load.sum()) == 8 * len(picked)
    for one in picked:
        assert torch.equal(one.rows[: int(one.size)][one.position], one.ids)
    assert all(len(some.unique()) == 4 for some in found)
    assert torch.equal(found[0], found[-1])
    assert not all(torch.equal(found[0], some) for some in found)
    assert meft.routing.topk.select_neurons is original


def test_other_tokens_than_announced_are_refused():
    with pytest.raises(ValueError, match="and not for 5"):
        routing.Routing("0.5").ids(8, 3, 1, 4)(0, 5, 2)


@pytest.fixture(scope="module")
def recorded():
    return routing.Recorded.read()


def test_recording_is_small_and_whole(recorded):
    assert routing.RECORD.stat().st_size < 300_000
    assert recorded.counts.shape == (30, 6400)
    assert (recorded.counts[:, :-1] >= recorded.counts[:, 1:]).all()
    assert {f"{b}x{n}" for b, n in plan.SHAPES} <= recorded.about["union_share"].keys()
    picks = recorded.about["picks_a_token"]
    total = recorded.counts.sum(1) / recorded.about["recorded_tokens"]
    assert total == pytest.approx(picks, abs=0.01)


@pytest.mark.parametrize("layer", [0, 29])
def test_draws_use_as_many_neurons_as_the_recording(recorded, layer):
    ids = routing.drawn_ids(recorded, layer, 2, 256, 64, 6400, seed=3)
    assert torch.equal(ids, routing.drawn_ids(recorded, layer, 2, 256, 64, 6400, seed=3))
    assert all(len(set(row.tolist())) == 64 for row in ids)
    assert len(ids.unique()) / 6400 == pytest.approx(recorded.share(layer, 2, 256), rel=0.1)
    smaller = routing.drawn_ids(recorded, layer, 2, 256, 64, 3072, seed=3)
    assert int(smaller.max()) < 3072


def test_inclusion_adds_up(recorded):
    weights = recorded.weights(5, 6400)
    assert routing.inclusion(weights, 64).sum() == pytest.approx(64)
    assert routing.inclusion(weights[:10], 64).sum() == 10


# ---------------------------------------------------------------------------------------------------------- recording


def test_recording_counts_what_a_model_picks(monkeypatch):
    monkeypatch.setattr(record, "SHAPES", ((1, 8), (2, 8)))
    torch.manual_seed(0)
    base = models.frozen_model("tiny-llama", "bf16", CPU, torch.float32)
    model = get_peft_model(base, MEFTConfig(r=64, top_k=4, experts_per_token=4, task_type="CAUSAL_LM"))
    ids = torch.randint(128, (64,))
    losses = record.train(model, record.batches(ids, 2, 8), 3, 1e-2)
    assert len(losses) == 3
    counter, shares = record.record(model, ids, 64, 2)
    assert counter.tokens == 2 * 8 + 2 * 16
    assert (counter.counts.sum(1) == counter.picks).all()
    assert (counter.picks <= 4 * counter.tokens).all()
    assert counter.picks.min() > 0
    assert {name: len(of) for name, of in shares.items()} == {"1x8": 4, "2x8": 4}
    assert all(0 < share <= 1 for of in shares.values() for share in of)
