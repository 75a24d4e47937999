import math

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from aslora_meft.data.samples import IGNORED
from aslora_meft.tasks.metrics import token_metrics, token_sums


def test_metrics_are_means_over_tokens():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    labels[0, 2:] = IGNORED
    labels[1] = IGNORED
    labels[2, 0] = IGNORED
    losses, right = [], []
    for row in range(3):
        for position in range(1, 5):
            if labels[row, position] != IGNORED:
                scores = logits[row, position - 1].double()
                losses.append(-(scores - scores.logsumexp(0))[labels[row, position]].item())
                right.append(scores.argmax().item() == labels[row, position].item())

    metrics = token_metrics(EvalPrediction(predictions=token_sums(logits, labels).numpy(), label_ids=labels.numpy()))
    assert metrics["tokens"] == len(losses) == 5
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert metrics["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-6)
    assert metrics["accuracy"] == np.mean(right)


def test_a_diverged_model_has_a_finite_or_infinite_perplexity_but_no_error():
    sums = np.array([[1e6, 0.0, 10.0]])
    assert token_metrics(EvalPrediction(predictions=sums, label_ids=None))["perplexity"] > 1e300
