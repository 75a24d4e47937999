"""Questions, a tokenizer of letters and a tiny model that reads them."""

import json
from pathlib import Path

from transformers import LlamaForCausalLM

from tests.support.models import llama

LETTERS = "abcdefghijklmnopqrstuvwxyz ?'."


class Letters:
    """A tokenizer whose tokens are characters; 0 pads, 1 ends the text."""

    eos_token_id = 1

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [2 + LETTERS.index(letter) for letter in text.lower()]}

    def decode(self, ids, skip_special_tokens):
        return "".join(LETTERS[i - 2] for i in ids if i > 1)


def tiny() -> LlamaForCausalLM:
    sizes = {"vocab_size": 2 + len(LETTERS), "hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 2}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return llama(**sizes, **special, initializer_range=0.3)


def write_questions(folder: Path, rows: list[dict]) -> None:
    (folder / "nq_open").mkdir()
    lines = (json.dumps(row) + "\n" for row in rows)
    (folder / "nq_open" / "NQ-open.dev.jsonl").write_text("".join(lines))


QUESTIONS = [{"question": f"who is {letter}", "answer": [f"the {letter}o", letter]} for letter in LETTERS[:12]]
