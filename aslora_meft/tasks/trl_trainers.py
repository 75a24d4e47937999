"""What the tasks on trl's trainers have in common: trl itself, its configs, and rows of preference pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from aslora_meft.arguments.groups import DataArguments
from aslora_meft.data.formats import text_of, turns_of
from aslora_meft.errors import UsageError
from aslora_meft.tasks.task import TaskData, check_lengths, read_task_rows

_PAIR = ("prompt", "chosen", "rejected")


def import_trl(needed_by: str) -> Any:
    """The package trl.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import datasets  # noqa: F401  # which trl's trainers take their data in
        import trl
    except ImportError as error:
        raise UsageError(f"{needed_by} needs the package trl; pip install 'aslora-meft[trl]'") from error
    return trl


def trl_config(config: Any, args: TrainingArguments, **own: Any) -> Any:
    """A trl config with the values of `args`, and fields of its own."""
    values = {item.name: getattr(args, item.name) for item in dataclasses.fields(TrainingArguments) if item.init}
    return config(**values, **own)


def train_in_float32(model: Any) -> None:
    """Give the values that are trained beside a quantised base model their float32 again, which trl casts to bfloat16.

    In bfloat16 small updates are lost, and a head does not take the float32 states that come out of a quantised model.
    """
    if getattr(model.get_base_model(), "is_quantized", False):
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.float()


def load_pairs(data: DataArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> TaskData:
    """Preference pairs in trl's forms: texts, or conversations as lists of turns; the prompt may be in both answers.

    Raises:
        UsageError: rows of no such form, or of different ones.
    """
    if tokenizer.eos_token is None:
        raise UsageError("the model's tokenizer has no EOS token, with which answers end; add one to it")
    read = read_task_rows(data, seed, ("chosen", "rejected"))
    conversational = isinstance(read.train[0]["chosen"], list)
    prompted = read.train[0].get("prompt") is not None
    if conversational and tokenizer.chat_template is None:
        raise UsageError(
            "the data holds conversations and the model's tokenizer has no chat template; give prompt, chosen and "
            "rejected as texts"
        )
    columns = _PAIR if prompted else _PAIR[1:]
    for row in (*read.train, *read.held_out):
        _check_pair(row, columns, conversational)
    train, held_out = ([{name: row[name] for name in columns} for row in part] for part in (read.train, read.held_out))
    form = "conversations" if conversational else "texts"
    lines = [("train", f"{len(train):,} pairs of {form}"), ("held out", f"{len(held_out):,} pairs")]
    return TaskData(train, held_out, [*lines, ("columns", ", ".join(columns))])


def _check_pair(row: dict[str, Any], columns: tuple[str, ...], conversational: bool) -> None:
    """Check a pair, and put its turns into the one form that trl reads."""
    where = row["where"]
    if (row.get("prompt") is not None) != ("prompt" in columns):
        raise UsageError(f"{where}: column 'prompt' is filled in some rows only; fill it in all or in none")
    for name in columns:
        if isinstance(row.get(name), list) != conversational:
            raise UsageError(
                f"{where}: column {name!r} holds {'text' if conversational else 'turns'} and the first row's 'chosen' "
                f"{'turns' if conversational else 'text'}; write all in one form"
            )
        if conversational:
            row[name] = [
                {"role": turn["role"], "content": turn["content"]} for turn in turns_of(row[name], f"{where}: {name}")
            ]
        else:
            text_of(row, name, where)
    if row["chosen"] == row["rejected"]:
        raise UsageError(f"{where}: 'chosen' equals 'rejected', which prefers nothing; correct or delete the row")


def check_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    trainer: Trainer,
    data: TaskData,
    columns: tuple[str, ...],
) -> None:
    """Check what trl has made of the pairs against the model, and note how many it has left out.

    Args:
        data: an evaluation's has its held-out rows in `train` too.
        columns: of token ids, as trl names them.

    Raises:
        UsageError: no rows are left, or the model lacks places or embeddings for them.
    """
    highest = 0
    parts: list[Any] = [
        ("training", trainer.train_dataset, data.train),
        ("held-out", trainer.eval_dataset, data.held_out),
    ]
    for name, part, rows in parts[1:] if data.train is data.held_out else parts:
        if not len(part):
            raise UsageError(f"max_length={max_length} leaves none of the {len(rows)} {name} rows; give more")
        if len(part) < len(rows):
            note = f"{len(rows) - len(part)} of {len(rows)} {name} rows are too long for max_length={max_length}"
            data.lines.append(("note", f"{note} and were left out"))
        highest = max(highest, *(max(row[column], default=0) for row in part for column in columns))
    check_lengths(model, tokenizer, highest, max_length)


def check_cuts(trainer: Trainer, data: TaskData, max_length: int) -> None:
    """Note how many pairs have answers that DPO's collator cuts.

    Raises:
        UsageError: what is left of two answers is equal, so that nothing is preferred.
    """
    parts: list[Any] = [trainer.train_dataset, trainer.eval_dataset]
    for name, part in zip(("training", "held-out"), parts, strict=True):
        cut = 0
        for row in part:
            room = max_length - len(row["prompt_ids"])
            if max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= room:
                continue
            cut += 1
            if row["chosen_ids"][:room] == row["rejected_ids"][:room]:
                longest = len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
                raise UsageError(
                    f"max_length={max_length} cuts the two answers of a {name} row to equal ones; give {longest}, or "
                    "delete the row"
                )
        if cut:
            data.lines.append(("note", f"{cut} of {len(part)} {name} rows have answers cut at max_length={max_length}"))


def measured_evenly(trainer: Trainer, measure: Callable[[Trainer], dict[str, float]]) -> dict[str, float]:
    """Measure in batches of one size: trl's accuracies and margins are means over batches, whatever is in the last."""
    args, asked = trainer.args, trainer.args.per_device_eval_batch_size
    rows: Any = trainer.eval_dataset
    at_once = max(1, args.n_gpu) * args.world_size
    fitting = [size for size in range(1, asked + 1) if len(rows) % (size * at_once) == 0]
    args.per_device_eval_batch_size = max(fitting, default=1)
    try:
        return measure(trainer)
    finally:
        args.per_device_eval_batch_size = asked
