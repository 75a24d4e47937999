"""Held-out loss, perplexity and accuracy, each per token."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from transformers import EvalPrediction

from aslora_meft.data.samples import IGNORED


def token_sums(
    logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor, *, next_token: bool = True
) -> torch.Tensor:
    """Shrink logits [batch, length, vocabulary] at once to three sums a row, so that no logits are kept.

    Args:
        next_token: whether a position's logits are for the label after it, and not for its own as in a decoder that
            reads its targets shifted.

    Returns:
        float64 [batch, 3]: negative log-likelihood in nats, tokens guessed right, tokens counted.
    """
    if isinstance(logits, tuple):
        logits = logits[0]
    if next_token:
        logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != IGNORED
    loss = F.cross_entropy(logits.transpose(1, 2).float(), labels, ignore_index=IGNORED, reduction="none")
    right = (logits.argmax(-1) == labels) & counted
    return torch.stack([loss.double().sum(1), right.double().sum(1), counted.double().sum(1)], dim=1)


def token_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Turn the rows of :func:`token_sums` into means over all tokens (the Trainer's own loss is one over batches)."""
    loss, right, counted = np.asarray(prediction.predictions).sum(axis=0)
    return {
        "loss": float(loss / counted),
        "perplexity": math.exp(min(loss / counted, 700.0)),
        "accuracy": float(right / counted),
        "tokens": int(counted),
    }
