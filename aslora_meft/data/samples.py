"""From rows to token ids with labels: what is learnt, where it is cut, what is held out."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, TypedDict, TypeVar

from transformers import PreTrainedTokenizerBase

from aslora_meft.arguments.groups import DataArguments
from aslora_meft.data.chat import Segments, chat_segments
from aslora_meft.data.files import Row, read_rows
from aslora_meft.data.formats import Format, conversation, prompt_and_completion, recognise, text_of
from aslora_meft.errors import UsageError

Item = TypeVar("Item")
IGNORED = -100  # a label that torch's cross entropy leaves out


class Sample(TypedDict):
    """One sequence of at most ``max_length`` tokens; ``labels`` holds IGNORED where nothing is learnt."""

    input_ids: list[int]
    labels: list[int]


@dataclass
class Source:
    """One file or data set, encoded.

    Attributes:
        where: the argument and its value, as messages name it.
        format: what its rows are.
        rows: the samples of each row that has something to learn.
        notes: sentences about rows that were cut, split or left out.
    """

    where: str
    format: Format
    rows: list[list[Sample]]
    notes: list[str]


class Samples(NamedTuple):
    """What is trained on, what is held out, and where both come from."""

    train: list[Sample]
    held_out: list[Sample]
    sources: list[Source]


def load_samples(args: DataArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> Samples:
    """Read, tokenise and split the data.

    Raises:
        UsageError: any field, file, column or row that cannot be used.
    """
    check_sizes(args)
    sources = [_source(name, "data", args.data_split, args, tokenizer) for name in args.data]
    if args.eval_data is None:
        return Samples(*split(_units(sources), args.eval_size, seed), sources)
    held_out = [_source(name, "eval_data", args.eval_split, args, tokenizer) for name in args.eval_data]
    train, evaluated = (list(chain.from_iterable(_units(part))) for part in (sources, held_out))
    return Samples(train, evaluated, sources + held_out)


def check_sizes(args: DataArguments) -> None:
    """Raises: UsageError: `max_length` or `eval_size` is out of its range."""
    if args.max_length < 2:
        raise UsageError(f"max_length={args.max_length} leaves nothing to predict; give at least 2")
    if not 0 < args.eval_size < 1 and not (1 <= args.eval_size < 2**53 and args.eval_size == int(args.eval_size)):
        raise UsageError(f"eval_size={args.eval_size} is neither a share in (0, 1) nor a number of rows; try 0.1")


def _source(name: str, field: str, split: str, args: DataArguments, tokenizer: PreTrainedTokenizerBase) -> Source:
    rows = read_rows(name, field=field, config=args.data_config, split=split)
    return encode_rows(rows, args, tokenizer, where=f"{field}={name!r}")


def _units(sources: list[Source]) -> list[list[Sample]]:
    """What the split holds out whole: rows, and of several files of one text each their windows."""
    if len(sources) == 1:
        return sources[0].rows
    return [
        unit
        for source in sources
        for unit in ([[window] for window in source.rows[0]] if len(source.rows) == 1 else source.rows)
    ]


def split(encoded: list[list[Item]], eval_size: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Hold out a share (``eval_size`` < 1) or a number of rows, chosen by ``seed``; one text is split by windows."""
    units = [[window] for window in encoded[0]] if len(encoded) == 1 else encoded
    count = max(1, round(eval_size * len(units))) if eval_size < 1 else int(eval_size)
    if count >= len(units):
        raise UsageError(f"eval_size={eval_size:g} holds out all of the {len(units)} rows; lower it or give eval_data")
    held_out = set(random.Random(seed).sample(range(len(units)), count))
    train = [sample for index, unit in enumerate(units) if index not in held_out for sample in unit]
    return train, [sample for index in sorted(held_out) for sample in units[index]]


def encode_rows(rows: list[Row], args: DataArguments, tokenizer: PreTrainedTokenizerBase, where: str) -> Source:
    """Tokenise every row: text becomes windows of ``max_length`` tokens, other rows are cut there.

    Raises:
        UsageError: rows of no known format, a row that cannot be used, or nothing to learn in any.
    """
    fmt = recognise(rows, args, where)
    encoded: list[list[Sample]] = []
    longest = cut = split_rows = 0
    for number, row in enumerate(rows, 1):
        chains = _chains(row, fmt, args, tokenizer, f"{where} row {number}")
        split_rows += len(chains) > 1
        samples: list[Sample] = []
        for segments in chains:
            # A chat template writes its own special tokens.
            special = fmt.kind != "messages"
            ids, labels = _tokenize(segments, tokenizer, special=special, completion_only=args.completion_only)
            longest = max(longest, len(ids))
            cut += fmt.kind != "text" and len(ids) > args.max_length
            starts = range(0, len(ids), args.max_length) if fmt.kind == "text" else range(1)
            windows = [slice(start, start + args.max_length) for start in starts]
            samples += [Sample(input_ids=ids[window], labels=labels[window]) for window in windows]
        # The first token of a sequence is never predicted.
        encoded.append([sample for sample in samples if any(label != IGNORED for label in sample["labels"][1:])])
    kept = [samples for samples in encoded if samples]
    if not kept:
        raise UsageError(f"max_length={args.max_length} leaves nothing to learn in any row of {where}; give {longest}")
    notes = []
    if split_rows:
        notes.append(
            f"{where}: the chat template rewrites earlier turns, so {split_rows} of {len(rows)} conversations became "
            "one sample for each assistant turn."
        )
    if cut:
        notes.append(
            f"{where}: {cut} of {len(rows)} rows exceed max_length={args.max_length} (longest: {longest} tokens) and "
            f"were cut; {len(encoded) - len(kept)} had no completion left."
        )
    return Source(where, fmt, kept, notes)


def _chains(
    row: Row, fmt: Format, args: DataArguments, tokenizer: PreTrainedTokenizerBase, where: str
) -> list[Segments]:
    """The texts of a row: tokenised one by one, so that the prompt has the tokens that it has when the model is asked,
    and the border of the loss is exact.
    """
    if fmt.kind == "text":
        return [[(text_of(row, fmt.used[0], where), True)]]
    if fmt.kind == "messages":
        return chat_segments(*conversation(row, fmt, where), tokenizer, where)
    prompt, completion = prompt_and_completion(row, fmt, args, where)
    return [[(prompt, False), (completion, True)]]


def _tokenize(
    segments: Segments, tokenizer: PreTrainedTokenizerBase, *, special: bool, completion_only: bool
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
