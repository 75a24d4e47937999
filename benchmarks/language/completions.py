"""Pairs of prompt and completion, of which only the completion's tokens carry loss: encoding, batching, scoring."""

import random
from collections.abc import Iterator

import torch
import torch.nn.functional as F

Encoded = tuple[list[int], int]  # token ids of prompt + completion, number of completion tokens


def encode(tokenizer, pairs: list[tuple[str, str]]) -> list[Encoded]:
    """Token ids of prompt, completion and end-of-text token."""
    encoded = []
    for prompt, completion in pairs:
        done = tokenizer(completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        encoded.append((tokenizer(prompt, add_special_tokens=False)["input_ids"] + done, len(done)))
    return encoded


def training_batches(examples: list[Encoded], steps: int, batch_size: int, seed: int) -> list[list[Encoded]]:
    """`steps` batches drawn without replacement; of four consecutive ones, each holds examples of like length."""
    order = random.Random(seed)
    drawn = order.sample(examples, steps * batch_size)
    batches = []
    for start in range(0, len(drawn), 4 * batch_size):
        window = sorted(drawn[start : start + 4 * batch_size], key=lambda example: len(example[0]))
        chunk = [window[at : at + batch_size] for at in range(0, len(window), batch_size)]
        order.shuffle(chunk)
        batches += chunk
    return batches


def collate(batch: list[Encoded], device: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Left-padded model inputs, and labels [batch, longest completion] with -100 where no loss is."""
    width = max(len(ids) for ids, _ in batch)
    done = max(n for _, n in batch)
    ids, mask, labels = [], [], []
    for tokens, n in batch:
        pad = width - len(tokens)
        ids.append([0] * pad + tokens)
        mask.append([0] * pad + [1] * len(tokens))
        labels.append([-100] * (done - n) + tokens[len(tokens) - n :])
    attention = torch.tensor(mask, device=device)
    inputs = {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": attention,
        "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
    }
    return inputs, torch.tensor(labels, device=device)


def completion_logits(model, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Logits [batch, longest completion, vocabulary] that predict `labels`; no other position meets the vocabulary."""
    return model(**inputs, logits_to_keep=labels.shape[1] + 1).logits[:, :-1].float()


def completion_losses(model, batches: list[list[Encoded]], device: str) -> Iterator[torch.Tensor]:
    """The mean loss of a completion's token, of one batch after the other."""
    for batch in batches:
        inputs, labels = collate(batch, device)
        yield F.cross_entropy(completion_logits(model, inputs, labels).flatten(0, 1), labels.flatten())


@torch.no_grad()
def score(model, examples: list[Encoded], device: str, batch_size: int = 16) -> list[tuple[int, float]]:
    """Per example, in the given order: (greedy generation equals the completion, mean loss of its completion tokens).

    Greedy generation writes the completion exactly when each of its tokens, the end-of-text token too, is the argmax
    after the true tokens before it: one forward pass decides it, and no decoding loop is run.
    """
    model.eval()
    results: dict[int, tuple[int, float]] = {}
    order = sorted(range(len(examples)), key=lambda index: len(examples[index][0]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        inputs, labels = collate([examples[index] for index in chosen], device)
        logits = completion_logits(model, inputs, labels)
        kept = labels != -100
        exact = ((logits.argmax(-1) == labels) | ~kept).all(1)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
        loss = loss.sum(1) / kept.sum(1)
        results.update(zip(chosen, zip(exact.int().tolist(), loss.tolist(), strict=True), strict=True))
    return [results[index] for index in range(len(examples))]
