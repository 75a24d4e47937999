"""Facts to learn by heart: N question-answer pairs of NQ-open, of which the answers are asked for.

The file is closed-book: a question has no text that holds its answer, so whatever is recalled sits in the weights.
"""

import json
import random
import re
import string
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.common.quality_arguments import DataError
from benchmarks.language.completions import Encoded, encode, training_batches

FILE = "nq_open/NQ-open.dev.jsonl"
MAX_NEW_TOKENS = 12


@dataclass(frozen=True)
class Pair:
    """One question, the answer that is trained (the first listed), and all the answers that the file accepts."""

    question: str
    answers: tuple[str, ...]

    @property
    def prompt(self) -> str:
        return f"{self.question}?"

    @property
    def completion(self) -> str:
        return f" {self.answers[0]}"


@dataclass(frozen=True)
class Recall:
    """How many pairs, and for how long they are trained; the character limits keep a step cheap."""

    n_pairs: int
    steps: int
    batch_size: int = 8
    max_question: int = 50
    max_answer: int = 24

    @property
    def name(self) -> str:
        return f"nq_open {self.n_pairs}"

    def settings(self) -> dict:
        """What a row depends on beside its method."""
        return asdict(self) | {"max_new_tokens": MAX_NEW_TOKENS}


def load_pairs(data: Path, task: Recall, tokenizer) -> list[Pair]:
    """The first `n_pairs` of one fixed shuffle, so that a smaller task is part of a larger one; DataError if too few.

    An answer with its end-of-text token fits into the tokens that generation may write.
    """
    try:
        lines = (data / FILE).read_text(encoding="utf-8").split("\n")
        found = dict(_pair(json.loads(line)) for line in lines if line.strip())
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"--data {data}: cannot read {FILE} there ({error!r}); give the folder that holds nq_open/."
        ) from error
    short = [
        Pair(question, answers)
        for question, answers in found.items()
        if len(question) <= task.max_question and len(answers[0]) <= task.max_answer and normalise(answers[0])
    ]
    random.Random(0).shuffle(short)
    fitting = []
    for pair in short:
        if len(tokenizer(pair.completion, add_special_tokens=False)["input_ids"]) < MAX_NEW_TOKENS:
            fitting.append(pair)
        if len(fitting) == task.n_pairs:
            return fitting
    raise DataError(f"--data {data}: nq_open has {len(fitting)} short pairs, {task.n_pairs} are needed.")


def _pair(row: dict) -> tuple[str, tuple[str, ...]]:
    """Question and answers of a line. Raises ValueError: the answers are no list, as a single text would not be."""
    if not isinstance(row["answer"], list) or not row["answer"]:
        raise ValueError(f"answer={row['answer']!r} is not a list of texts")
    return row["question"].strip(), tuple(answer.strip() for answer in row["answer"])


def encode_pairs(tokenizer, pairs: list[Pair]) -> list[Encoded]:
    """Token ids of question, trained answer and end-of-text token."""
    return encode(tokenizer, [(pair.prompt, pair.completion) for pair in pairs])


def epochs(examples: list[Encoded], steps: int, batch_size: int, seed: int) -> list[list[Encoded]]:
    """`steps` batches: pass after pass over all examples, each pass in an order of its own."""
    per_pass = len(examples) // batch_size
    passes = -(-steps // per_pass)
    drawn = [training_batches(examples, per_pass, batch_size, 1000 * seed + number) for number in range(passes)]
    return [batch for batches in drawn for batch in batches][:steps]


def normalise(answer: str) -> str:
    """As usual for Natural Questions: lower case, without punctuation, articles and superfluous blanks."""
    plain = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def exact_match(said: str, answers: tuple[str, ...] | list[str]) -> bool:
    """Whether `said` equals one of the answers once both are normalised."""
    return normalise(said) in {normalise(answer) for answer in answers}


@torch.no_grad()
def recall(model, tokenizer, pairs: list[Pair], device: str, batch_size: int = 64) -> list[str]:
    """The first line that greedy generation writes after each question, in the order of `pairs`."""
    model.eval()
    ids = [tokenizer(pair.prompt, add_special_tokens=False)["input_ids"] for pair in pairs]
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    said: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(ids[index]) for index in chosen)
        padded = [[0] * (width - len(ids[index])) + ids[index] for index in chosen]
        mask = [[0] * (width - len(ids[index])) + [1] * len(ids[index]) for index in chosen]
        written = model.generate(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )[:, width:]
        for index, row in zip(chosen, written.tolist(), strict=True):
            text = tokenizer.decode(row, skip_special_tokens=True).strip()
            said[index] = text.splitlines()[0] if text else ""
    return [said[index] for index in range(len(pairs))]
