"""Pairs of prompt and completion: batches, labels, scores."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.language import completions
from tests.support.models import llama


class Words:
    """A tokenizer whose tokens are characters."""

    eos_token_id = 1

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [2 + ord(letter) % 60 for letter in text]}


def test_batches_draw_without_replacement_and_follow_the_seed():
    examples = [([i] * (1 + i % 7), 1) for i in range(40)]
    batches = completions.training_batches(examples, 9, 4, seed=3)
    drawn = [example[0][0] for batch in batches for example in batch]
    assert [len(batch) for batch in batches] == [4] * 9
    assert len(set(drawn)) == 36
    assert batches == completions.training_batches(examples, 9, 4, seed=3)
    assert batches != completions.training_batches(examples, 9, 4, seed=4)


def test_labels_are_the_completion_alone():
    batch = completions.encode(Words(), [("ab", "c"), ("a", "cde")])
    inputs, labels = completions.collate(batch, "cpu")
    assert inputs["input_ids"].shape == (2, 5)
    assert inputs["attention_mask"].tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert inputs["position_ids"].tolist() == [[0, 0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert [sum(label != -100 for label in row) for row in labels.tolist()] == [2, 4]
    assert labels[:, -1].tolist() == [1, 1]


def test_score_is_what_greedy_generation_gives():
    """One forward pass over the true completion decides what a decoding loop would, padding or not."""
    base = llama(intermediate_size=32, num_key_value_heads=2, pad_token_id=0, eos_token_id=None)
    model = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM")).eval()
    prompts = [[2 + i] * (1 + i % 5) for i in range(12)]
    greedy = [
        model.generate(input_ids=torch.tensor([ids]), max_new_tokens=3, do_sample=False)[0].tolist() for ids in prompts
    ]
    right = [(ids, 3) for ids in greedy]
    wrong = [(ids[:-2] + [(ids[-2] + 1) % 64] + ids[-1:], 3) for ids in greedy]
    scored = completions.score(model, right + wrong, "cpu", batch_size=5)
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(model(torch.tensor([ids])).logits[0, -4:-1], torch.tensor(ids[-3:]))
            for ids, _ in right + wrong
        ]
    assert [exact for exact, _ in scored] == [1] * 12 + [0] * 12
    assert [loss for _, loss in scored] == pytest.approx([loss.item() for loss in losses], abs=1e-5)
