import copy
import json

import pytest
from tokenizers import processors

from aslora_meft.arguments.groups import DataArguments
from aslora_meft.data.samples import IGNORED, encode_rows, load_samples, split
from aslora_meft.errors import UsageError

BOS, EOS = 0, 1


def encode(rows, tokenizer, **fields):
    return encode_rows(rows, DataArguments(data=["d"], **fields), tokenizer, where="d").rows


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_loss_on_the_completion_only(tokenizer):
    [[sample]] = encode([{"prompt": "word1 word2", "completion": "word3"}], tokenizer)
    prompt, completion = ids(tokenizer, "word1 word2\n"), ids(tokenizer, "word3")
    assert sample["input_ids"] == [BOS, *prompt, *completion, EOS]
    assert sample["labels"] == [IGNORED] * (1 + len(prompt)) + [*completion, EOS]


def test_loss_on_everything(tokenizer):
    [[sample]] = encode([{"prompt": "a", "completion": "b"}], tokenizer, completion_only=False)
    assert sample["labels"] == sample["input_ids"]


def test_named_columns_and_separator(tokenizer):
    fields = {"prompt_column": "question", "completion_column": "answer", "separator": " => "}
    [[sample]] = encode([{"question": "q", "answer": "a", "text": "t"}], tokenizer, **fields)
    assert tokenizer.decode(sample["input_ids"]) == "<bos>q => a<eos>"


def test_a_tokenizer_without_bos_gets_none(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.backend_tokenizer.post_processor = processors.ByteLevel()
    [[sample]] = encode([{"text": "word1"}], bare)
    assert sample["input_ids"] == [*ids(bare, "word1"), EOS]


CHAT = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": "one"},
    {"role": "user", "content": "v"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "unanswered"},
]


def test_all_assistant_turns_are_learnt_and_nothing_else(tokenizer):
    [[sample]] = encode([{"messages": CHAT}], tokenizer)
    assert tokenizer.decode(sample["input_ids"]) == (
        "<|system|>s<eos><|user|>u<eos><|assistant|>one<eos><|user|>v<eos><|assistant|>two<eos>"
    )
    learnt = [token for token, label in zip(sample["input_ids"], sample["labels"], strict=True) if label != IGNORED]
    assert tokenizer.decode(learnt) == "one<eos>two<eos>"
    assert learnt == [label for label in sample["labels"] if label != IGNORED]


def test_prompt_and_completion_in_the_chat_template(tokenizer):
    row = {"prompt": "u", "completion": "one"}
    assert encode([row], tokenizer, apply_chat_template=True) == encode([{"messages": [*CHAT[1:3]]}], tokenizer)


def test_text_is_cut_into_windows_that_lose_nothing(tokenizer):
    text = "".join(f"word{i} " for i in range(30))
    [windows] = encode([{"text": text}], tokenizer, max_length=16)
    joined = [token for window in windows for token in window["input_ids"]]
    assert joined == [BOS, *ids(tokenizer, text), EOS][: len(joined)]
    assert len(joined) >= len(ids(tokenizer, text)) + 1  # at most the EOS alone is left out: nothing predicts it
    assert {len(window["input_ids"]) for window in windows[:-1]} == {16}
    assert all(window["labels"][1:] == window["input_ids"][1:] for window in windows)


def test_long_rows_are_cut_and_told(tokenizer):
    rows = [{"prompt": "p", "completion": "c" * 50}, {"prompt": "p" * 50, "completion": "c"}]
    source = encode_rows(rows, DataArguments(data=["d"], max_length=20), tokenizer, where="d")
    [[kept]] = source.rows
    assert len(kept["input_ids"]) == 20
    [note] = source.notes
    assert "2 of 2 rows exceed max_length=20 (longest: 54 tokens) and were cut; 1 had no completion left" in note


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        (
            [{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": " "}],
            {},
            "d row 2: column 'completion' is",
        ),
        ([{"prompt": "p", "completion": "c"}, {"prompt": "p"}], {}, "d row 2: column 'completion' is empty"),
        ([{"prompt": "p", "completion": 3}], {}, "d row 1: column 'completion' holds int, not text"),
        ([{"question": "p"}], {}, "columns 'question' but neither messages, conversations, prompt and completion"),
        ([{"text": "p"}], {"prompt_column": "question"}, "no column 'question'; its columns are 'text'"),
        ([{"text": ""}], {}, "d row 1: column 'text' is empty"),
        ([{"prompt": "pppp", "completion": "c"}], {"max_length": 3}, "max_length=3 leaves nothing to learn"),
        ([{"messages": "hi"}], {}, "d row 1: messages is not a list of turns"),
        ([{"messages": CHAT[:2]}], {}, "d row 1: the conversation has no assistant turn"),
        (
            [{"messages": [*CHAT[:2], {"role": "assistant", "content": ""}]}],
            {},
            "turn 3: column 'content' is",
        ),
    ],
)
def test_bad_rows_are_named(tokenizer, rows, fields, message):
    with pytest.raises(UsageError, match=message):
        encode(rows, tokenizer, **fields)


def test_a_template_that_refuses_or_rewrites_is_named(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UsageError, match="row 1: the model's chat template refuses the turns: roles must alternate"):
        encode([{"messages": CHAT}], tokenizer)
    monkeypatch.setattr(
        tokenizer, "chat_template", "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(UsageError, match="writes the turns before an answer otherwise"):
        encode([{"messages": CHAT}], tokenizer)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(UsageError, match="has no chat template"):
        encode([{"messages": CHAT}], tokenizer)


def test_split_is_seeded_disjoint_and_whole():
    encoded = [[{"input_ids": [i], "labels": [i]}] for i in range(20)]
    train, held_out = split(encoded, 0.25, seed=3)
    assert len(held_out) == 5
    assert sorted(sample["input_ids"][0] for sample in train + held_out) == list(range(20))
    assert split(encoded, 0.25, seed=3) == (train, held_out)
    assert split(encoded, 0.25, seed=4) != (train, held_out)
    assert len(split(encoded, 3, seed=0)[1]) == 3


def test_windows_of_one_row_stay_on_one_side_unless_it_is_the_only_row():
    rows = [[{"input_ids": [i, j], "labels": [i, j]} for j in range(5)] for i in range(4)]
    train, held_out = split(rows, 0.25, seed=0)
    assert len(held_out) == 5
    assert not {s["input_ids"][0] for s in train} & {s["input_ids"][0] for s in held_out}
    train, held_out = split(rows[:1], 0.2, seed=0)
    assert (len(train), len(held_out)) == (4, 1)


def test_nothing_left_to_train_on():
    with pytest.raises(UsageError, match=r"eval_size=0\.1 holds out all of the 1 rows"):
        split([[{"input_ids": [1], "labels": [1]}]], 0.1, seed=0)


@pytest.mark.parametrize(
    ("fields", "name"),
    [({"eval_size": 0.0}, "eval_size"), ({"eval_size": 2.5}, "eval_size"), ({"max_length": 1}, "max_length")],
)
def test_fields_out_of_range(tokenizer, fields, name):
    with pytest.raises(UsageError, match=f"{name}={fields[name]}"):
        load_samples(DataArguments(data=["d.jsonl"], **fields), tokenizer, seed=0)


def test_held_out_file(tokenizer, tmp_path):
    for name, word in (("train", "a"), ("held_out", "b")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": word}))
    args = DataArguments(data=[str(tmp_path / "train.jsonl")], eval_data=[str(tmp_path / "held_out.jsonl")])
    train, held_out, _ = load_samples(args, tokenizer, seed=0)
    assert [tokenizer.decode(samples[0]["input_ids"]) for samples in (train, held_out)] == [
        "<bos>a<eos>",
        "<bos>b<eos>",
    ]
