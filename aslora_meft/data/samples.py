"""From rows to token ids with labels: what is learnt, where it is cut, what is held out."""

import logging
import random
from itertools import chain
from typing import TypedDict

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from aslora_meft.arguments import DataArguments
from aslora_meft.data.files import Row, read_rows
from aslora_meft.errors import UsageError

logger = logging.getLogger(__name__)
IGNORED = -100  # a label that torch's cross entropy leaves out


class Sample(TypedDict):
    """One sequence of at most ``max_length`` tokens; ``labels`` holds IGNORED where nothing is learnt."""

    input_ids: list[int]
    labels: list[int]


# A row is first a chain of texts, each with the mark whether it is learnt. They are tokenised one by one, so that the
# prompt has the tokens that it has when the model is asked, and the border of the loss is exact.
_Segments = list[tuple[str, bool]]


def load_samples(
    args: DataArguments, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """Read, tokenise and split the data.

    Returns:
        The samples to train on and those held out.

    Raises:
        UsageError: any field, file, column or row that cannot be used.
    """
    if args.max_length < 2:
        raise UsageError(f"max_length={args.max_length} leaves nothing to predict; give at least 2")
    if args.eval_size <= 0 or (args.eval_size >= 1 and args.eval_size != int(args.eval_size)):
        raise UsageError(f"eval_size={args.eval_size} is neither a share in (0, 1) nor a number of rows; try 0.1")
    rows = read_rows(args.data, field="data", config=args.data_config, split=args.data_split)
    encoded = encode_rows(rows, args, tokenizer, where=f"data={args.data!r}")
    if args.eval_data is None:
        return split(encoded, args.eval_size, seed)
    held_out = read_rows(args.eval_data, field="eval_data", config=args.data_config, split=args.eval_split)
    evaluated = encode_rows(held_out, args, tokenizer, where=f"eval_data={args.eval_data!r}")
    return list(chain.from_iterable(encoded)), list(chain.from_iterable(evaluated))


def split(encoded: list[list[Sample]], eval_size: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Hold out a share (``eval_size`` < 1) or a number of rows, chosen by ``seed``; one text is split by windows."""
    units = [[window] for window in encoded[0]] if len(encoded) == 1 else encoded
    count = max(1, round(eval_size * len(units))) if eval_size < 1 else int(eval_size)
    if count >= len(units):
        raise UsageError(f"eval_size={eval_size:g} holds out all of the {len(units)} rows; lower it or give eval_data")
    held_out = set(random.Random(seed).sample(range(len(units)), count))
    train = [sample for index, unit in enumerate(units) if index not in held_out for sample in unit]
    return train, [sample for index in sorted(held_out) for sample in units[index]]


def encode_rows(
    rows: list[Row], args: DataArguments, tokenizer: PreTrainedTokenizerBase, where: str
) -> list[list[Sample]]:
    """Tokenise every row: text becomes windows of ``max_length`` tokens, other rows are cut there.

    Returns:
        The samples of each row that has something to learn.
    """
    kind = _kind(rows[0], args, where)
    encoded: list[list[Sample]] = []
    longest = cut = 0
    for number, row in enumerate(rows, 1):
        segments = _segments(row, kind, args, tokenizer, f"{where} row {number}")
        # A chat template writes its own special tokens.
        special = kind in ("prompt", "text")
        ids, labels = _tokenize(segments, tokenizer, special=special, completion_only=args.completion_only)
        longest = max(longest, len(ids))
        cut += kind != "text" and len(ids) > args.max_length
        starts = range(0, len(ids), args.max_length) if kind == "text" else range(1)
        cuts = [slice(start, start + args.max_length) for start in starts]
        windows = [Sample(input_ids=ids[window], labels=labels[window]) for window in cuts]
        # The first token of a sequence is never predicted.
        encoded.append([sample for sample in windows if any(label != IGNORED for label in sample["labels"][1:])])
    kept = [samples for samples in encoded if samples]
    if not kept:
        raise UsageError(f"max_length={args.max_length} leaves nothing to learn in any row of {where}; give {longest}")
    if cut:
        logger.warning(
            "%s: %d of %d rows exceed max_length=%d (longest: %d tokens) and were cut; %d had no completion left.",
            *(where, cut, len(rows), args.max_length, longest, len(encoded) - len(kept)),
        )
    return kept


def _kind(row: Row, args: DataArguments, where: str) -> str:
    asked = [args.prompt_column, args.completion_column]
    if all(column in row for column in asked):
        return "turns" if args.apply_chat_template else "prompt"
    for column in asked:
        if column not in row and column not in ("prompt", "completion"):
            raise UsageError(f"{where} has no column {column!r}; its columns are {', '.join(map(repr, row))}")
    if "messages" in row:
        return "messages"
    if args.text_column in row:
        return "text"
    raise UsageError(
        f"{where} has the columns {', '.join(map(repr, row))} but neither messages, nor {asked[0]} and {asked[1]}, "
        f"nor {args.text_column}; name them with --prompt_column and --completion_column, or with --text_column"
    )


def _segments(row: Row, kind: str, args: DataArguments, tokenizer: PreTrainedTokenizerBase, where: str) -> _Segments:
    if kind == "text":
        return [(_text(row, args.text_column, where), True)]
    if kind == "messages":
        return _chat_segments(row.get("messages"), tokenizer, where)
    prompt, completion = _text(row, args.prompt_column, where), _text(row, args.completion_column, where)
    if kind == "prompt":
        return [(prompt + args.separator, False), (completion, True)]
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return _chat_segments(turns, tokenizer, where)


def _text(row: Row, column: str, where: str) -> str:
    value = row.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise UsageError(f"{where}: column {column!r} is empty; fill it or delete the row")
    if not isinstance(value, str):
        raise UsageError(f"{where}: column {column!r} holds {type(value).__name__}, not text; make it a string")
    return value


def _chat_segments(messages: object, tokenizer: PreTrainedTokenizerBase, where: str) -> _Segments:
    """The assistant's turns are learnt, everything that the template writes before them is not."""
    if tokenizer.chat_template is None:
        raise UsageError("the model's tokenizer has no chat template; give prompt and completion columns instead")
    if not isinstance(messages, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in messages
    ):
        raise UsageError(f"{where}: messages is not a list of turns with role and content; correct it")
    segments: _Segments = []
    done = ""
    for index, turn in enumerate(messages):
        _text(turn, "content", f"{where}, turn {index + 1}")
        if turn["role"] != "assistant":
            continue
        try:
            prompt = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
            until = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        except TemplateError as error:
            raise UsageError(f"{where}: the model's chat template refuses the messages: {error}") from error
        assert isinstance(prompt, str)
        assert isinstance(until, str)
        if not (prompt.startswith(done) and until.startswith(prompt)):
            raise UsageError(
                f"{where}: the model's chat template rewrites earlier turns, so that a turn's tokens cannot be told "
                "apart; give one assistant turn a row"
            )
        segments += [(prompt[len(done) :], False), (until[len(prompt) :], True)]
        done = until
    if not segments:
        raise UsageError(f"{where}: messages has no assistant turn to learn from; add one or delete the row")
    return segments


def _tokenize(
    segments: _Segments, tokenizer: PreTrainedTokenizerBase, *, special: bool, completion_only: bool
) -> tuple[list[int], list[int]]:
    """Token ids and labels of the chain."""
    pieces = [(tokenizer(text, add_special_tokens=False)["input_ids"], learnt) for text, learnt in segments]
    if special:
        # Only a tokenizer that starts its texts with BOS by itself gets one; the end is always marked, to be learnt.
        if tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
            pieces.insert(0, ([tokenizer.bos_token_id], False))
        if tokenizer.eos_token_id is not None:
            pieces.append(([tokenizer.eos_token_id], True))
    ids: list[int] = []
    labels: list[int] = []
    for piece, learnt in pieces:
        ids += piece
        labels += piece if learnt or not completion_only else [IGNORED] * len(piece)
    return ids, labels
