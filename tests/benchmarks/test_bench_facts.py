"""Facts to learn by heart, and the adapters that learn them; no real model is loaded."""

import pytest
import torch

from benchmarks.language import adapters, facts
from benchmarks.language.facts import Pair, Recall
from tests.support.facts import LETTERS, QUESTIONS, Letters, tiny, write_questions


@pytest.mark.parametrize(
    ("said", "plain"),
    [
        ("The  Eagles!", "eagles"),
        ("a U.S. state", "us state"),
        ("Theatre an", "theatre"),
        ("1,000", "1000"),
        ("the", ""),
    ],
)
def test_answers_are_normalised_as_usual(said, plain):
    assert facts.normalise(said) == plain


def test_exact_match_takes_any_of_the_answers_given():
    assert facts.exact_match("the Beatles.", ["beatles"])
    assert facts.exact_match("December 1972", ("14 December 1972", "december 1972"))
    assert not facts.exact_match("december 1972", ("14 December 1972",))
    assert not facts.exact_match("beatles band", ["beatles"])


def test_a_smaller_task_is_part_of_a_larger_and_long_ones_are_left_out(tmp_path):
    long = [{"question": "q" * 51, "answer": ["a"]}, {"question": "q", "answer": ["a" * 25]}]
    untold = [{"question": "what", "answer": ["the"]}, {"question": "how", "answer": ["twelve tokens"]}]
    write_questions(tmp_path, QUESTIONS + QUESTIONS[:3] + long + untold)
    all_of_them = facts.load_pairs(tmp_path, Recall(12, 1), Letters())
    assert facts.load_pairs(tmp_path, Recall(5, 1), Letters()) == all_of_them[:5]
    assert {pair.question for pair in all_of_them} == {row["question"] for row in QUESTIONS}
    assert all_of_them[0].completion == f" {all_of_them[0].answers[0]}"
    with pytest.raises(facts.DataError, match="12 short pairs, 13 are needed"):
        facts.load_pairs(tmp_path, Recall(13, 1), Letters())


def test_a_wrong_folder_is_one_sentence(tmp_path):
    with pytest.raises(facts.DataError, match=r"nq_open/NQ-open\.dev\.jsonl"):
        facts.load_pairs(tmp_path, Recall(1, 1), Letters())


@pytest.mark.parametrize("answer", ["Paris", [], [1], None])
def test_an_answer_that_is_no_list_of_texts_is_one_sentence(tmp_path, answer):
    """A single text would be trained by its first letter."""
    write_questions(tmp_path, [*QUESTIONS, {"question": "what", "answer": answer}])
    with pytest.raises(facts.DataError, match=r"cannot read nq_open/NQ-open\.dev\.jsonl there"):
        facts.load_pairs(tmp_path, Recall(1, 1), Letters())


def test_each_pass_has_each_pair_once_and_follows_the_seed():
    examples = [([i] * (1 + i % 7), 1) for i in range(16)]
    batches = facts.epochs(examples, 10, 4, seed=3)
    drawn = [example[0][0] for batch in batches for example in batch]
    assert [len(batch) for batch in batches] == [4] * 10
    assert sorted(drawn[:16]) == sorted(drawn[16:32]) == list(range(16))
    assert drawn[:16] != drawn[16:32]
    assert batches == facts.epochs(examples, 10, 4, seed=3)
    assert batches != facts.epochs(examples, 10, 4, seed=4)


def test_recall_is_what_each_question_alone_would_get():
    model, asked = tiny(), [Pair("who" + " is" * (i % 4) + LETTERS[i], ("a",)) for i in range(9)]
    together = facts.recall(model, Letters(), asked, "cpu", batch_size=4)
    assert together == [facts.recall(model, Letters(), [pair], "cpu")[0] for pair in asked]


def test_the_dense_adapter_starts_as_the_model_and_is_what_is_trained():
    model, ids = tiny(), torch.arange(2, 10)[None]
    before = model(ids).logits
    model = adapters.attach(model, "dense", 16, {})
    assert torch.equal(model(ids).logits, before)
    assert adapters.trainable_values(model) == 2 * 2 * 16 * 64
    adapter, x = model.model.layers[0].mlp, torch.randn(3, 64)
    adapter.values.data.normal_()
    expected = adapter.mlp(x) + torch.relu(x @ adapter.keys.T) @ adapter.values
    assert torch.allclose(adapter(x), expected, atol=1e-6)


def test_meft_starts_as_the_model():
    model, ids = tiny(), torch.arange(2, 18).view(2, 8)
    before = model(ids).logits
    model = adapters.attach(model, "meft", 16, {"experts_per_token": 4, "top_k": 8})
    assert torch.allclose(model(ids).logits, before, atol=1e-5)
    assert adapters.trainable_values(model) >= 2 * 2 * 16 * 64
