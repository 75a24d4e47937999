"""Conversations through the model's chat template: what of it is learnt, and where it must be split."""

from __future__ import annotations

import itertools
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from aslora_meft.arguments.text import is_encodable
from aslora_meft.errors import UsageError

# A row is first a chain of texts, each with the mark whether it is learnt.
Segments = list[tuple[str, bool]]


def chat_segments(
    turns: list[dict[str, Any]], context: int, tokenizer: PreTrainedTokenizerBase, where: str
) -> list[Segments]:
    """Write a conversation with the chat template; the assistant's turns are learnt, what is before them is not.

    Args:
        context: number of turns at the start that are not learnt, whoever speaks.

    Returns:
        One chain for the conversation; or, where the template writes earlier turns otherwise once there are later ones
        (Qwen3's drops their reasoning), one chain for each assistant turn, as the model sees it when it answers.

    Raises:
        UsageError: no chat template, no assistant turn, or a template that refuses the turns.
    """
    if tokenizer.chat_template is None:
        raise UsageError("the model's tokenizer has no chat template; give prompt and completion columns instead")
    whole: Segments = []
    parts: list[Segments] = []
    done = ""
    preserved = True
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant" or index < context:
            continue
        if index == 0:
            raise UsageError(f"{where}: the conversation begins with an answer; put the user's turn before it")
        prompt, answered = _asked_and_answered(turns, index, tokenizer, where)
        parts.append([(prompt, False), (answered[len(prompt) :], True)])
        preserved = preserved and prompt.startswith(done)
        whole += [(prompt[len(done) :], False), (answered[len(prompt) :], True)]
        done = answered
    if not parts:
        what = "the completion" if context else "the conversation"
        raise UsageError(f"{where}: {what} has no assistant turn to learn from; add one or delete the row")
    return [whole] if preserved else parts


def _asked_and_answered(
    turns: list[dict[str, Any]], index: int, tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[str, str]:
    """The text up to where an assistant turn begins, and up to its end."""
    prompt = _rendered(turns[:index], tokenizer, where, asks=True)
    answered = _rendered(turns[: index + 1], tokenizer, where, asks=False)
    if answered.startswith(prompt):
        return prompt, answered
    # Some templates open the reasoning when they ask, and leave it out of what was answered.
    least = _rendered(turns[:index], tokenizer, where, asks=False)
    pairs = zip(prompt, answered, strict=False)
    shared = prompt[: sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))]
    if len(shared) < len(least) or not answered.startswith(least):
        raise UsageError(
            f"{where}: the model's chat template writes the turns before an answer otherwise than with it, so that the "
            "answer's tokens cannot be told apart; give prompt and completion columns instead"
        )
    return shared, answered


def _rendered(turns: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str, *, asks: bool) -> str:
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=asks)
    except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise UsageError(
            f"{where}: the model's chat template refuses the turns: {' '.join(str(error).split())}; correct them"
        ) from error
    assert isinstance(text, str)
    if not is_encodable(text):  # such as the name of a role, or the words of a call
        raise UsageError(f"{where}: the turns hold half of a surrogate pair, which is no text; correct them")
    return text
