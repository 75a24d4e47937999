"""Every format of the documentation's table is read as it says; templates that rewrite turns split a conversation."""

import importlib.util
import sys
from pathlib import Path

import pytest

from aslora_meft.arguments.groups import DataArguments
from aslora_meft.data.samples import IGNORED, encode_rows, load_samples
from aslora_meft.errors import UsageError

DOCS = Path(__file__).resolve().parents[2] / "docs"


def module():
    spec = importlib.util.spec_from_file_location("data_cases", DOCS / "data_cases.py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["data_cases"] = loaded
    spec.loader.exec_module(loaded)
    return loaded


cases = module()


def learnt(samples, tokenizer):
    """The texts that are learnt, without the end of a text."""
    texts = [[token for token in sample["labels"] if token != IGNORED] for sample in samples]
    return [tokenizer.decode(tokens).replace("<eos>", "") for tokens in texts]


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_a_format_is_read(case, tmp_path, tokenizer):
    if case.needs:
        pytest.importorskip({"train": "pyarrow", "trl": "trl"}[case.needs])
    paths = cases.write(case, tmp_path)
    args = DataArguments(data=paths, eval_data=paths, **case.options)
    samples = load_samples(args, tokenizer, seed=0)
    assert learnt(samples.train, tokenizer) == case.learnt
    assert samples.held_out == samples.train


def test_the_table_of_the_documentation_is_of_today():
    pytest.importorskip("pyarrow")
    assert cases.table() in (DOCS / "data.md").read_text(encoding="utf-8"), "run python docs/data_cases.py"


def encode(rows, tokenizer, **fields):
    return encode_rows(rows, DataArguments(data=["d"], **fields), tokenizer, where="d")


# As Qwen3's: what is between <think> and </think> stays only after the last question.
REASONING = (
    "{% set last = namespace(user=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and loop.index0 < last.user %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_template_that_drops_reasoning_splits_the_conversation(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", REASONING)
    turns = [dict(turn) for turn in cases.TURNS]
    turns[1]["content"], turns[3]["content"] = "<think>a</think>two", "<think>b</think>four"
    source = encode([{"messages": turns}, {"messages": turns[:2]}], tokenizer)
    first, second = source.rows[0]
    assert tokenizer.decode(first["input_ids"]) == "<|user|>one<eos><|assistant|><think>a</think>two<eos>"
    assert tokenizer.decode(second["input_ids"]) == (
        "<|user|>one<eos><|assistant|>two<eos><|user|>three<eos><|assistant|><think>b</think>four<eos>"
    )
    assert learnt([first, second], tokenizer) == ["<think>a</think>two", "<think>b</think>four"]
    assert len(source.rows[1]) == 1
    [note] = source.notes
    assert "rewrites earlier turns, so 1 of 2 conversations became one sample for each assistant turn" in note


def test_a_template_that_opens_the_reasoning_when_it_asks(tokenizer, monkeypatch):
    """As DeepSeek-R1's: an answer without reasoning does not begin with what was asked."""
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    [[sample]] = encode([{"messages": cases.TURNS[:2]}], tokenizer).rows
    assert tokenizer.decode(sample["input_ids"]) == "<|user|>one<eos><|assistant|>two<eos>"
    assert learnt([sample], tokenizer) == ["two"]


def test_without_trl_sharegpt_names_the_extra(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(UsageError, match=r"trl converts; pip install 'aslora-meft\[trl\]'"):
        encode(cases.SHAREGPT, tokenizer)


def test_without_pyarrow_parquet_names_the_extra(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"pyarrow; pip install 'aslora-meft\[train\]'"):
        load_samples(DataArguments(data=[str(tmp_path / "a.parquet")]), tokenizer, seed=0)


def test_used_and_ignored_columns(tokenizer):
    fmt = encode([{"prompt": "p", "completion": "c", "id": 1, "source": "s"}], tokenizer).format
    assert str(fmt) == "prompt and completion: uses prompt, completion; ignores id, source"
