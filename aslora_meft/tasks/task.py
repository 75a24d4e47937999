"""What `train` asks a task: for the data, the base model, the Trainer and the metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

from aslora_meft.adapter import add_adapter, load_model
from aslora_meft.arguments.groups import DataArguments, TrainArguments
from aslora_meft.data.files import Row, read_rows
from aslora_meft.data.formats import listed
from aslora_meft.data.samples import check_sizes, split
from aslora_meft.errors import UsageError, as_usage_error


class TaskData(NamedTuple):
    """What is trained on, what is held out, and lines about both for the run's header."""

    train: list[Any]
    held_out: list[Any]
    lines: list[tuple[str, str]]


class Task(ABC):
    """One task of a run. Everything that the user gave is checked by the time that `make_trainer` returns.

    Attributes:
        titles: metric of `measure` -> what tables call it.
    """

    titles: ClassVar[dict[str, str]]

    def __init__(self, arguments: TrainArguments, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = arguments.model
        self.data = arguments.data
        self.options = arguments.task
        self.args = arguments.trainer
        self.tokenizer = tokenizer

    @abstractmethod
    def load_data(self) -> TaskData:
        """Read, check and split the data.

        Raises:
            UsageError: any field, file, column or row that cannot be used.
        """

    def load_model(self, device: torch.device) -> PreTrainedModel:
        """Load the base model; only after the data."""
        return load_model(self.model, device)

    @abstractmethod
    def make_trainer(
        self, base: PreTrainedModel, adapter: PeftConfig, data: TaskData, callbacks: list[TrainerCallback]
    ) -> Trainer:
        """Put the adapter into the base model, and make the Trainer of both.

        Raises:
            UsageError: an adapter, or settings of the Trainer, that cannot be used.
        """

    def adapted(self, base: PreTrainedModel, adapter: PeftConfig) -> Any:
        """The base model with a new adapter."""
        return add_adapter(base, adapter, gradient_checkpointing=bool(self.args.gradient_checkpointing))

    def plain_trainer(self, model: Any, data: TaskData, callbacks: list[TrainerCallback], **own: Any) -> Trainer:
        """The Trainer of transformers.

        Args:
            own: collator, metrics, and what stands in the place of other arguments.

        Raises:
            UsageError: settings that it refuses.
        """
        given: dict[str, Any] = {"train_dataset": data.train, "eval_dataset": data.held_out}
        with as_usage_error(ValueError, ImportError, TypeError):
            return Trainer(
                model=model, args=self.args, processing_class=self.tokenizer, callbacks=callbacks, **(given | own)
            )

    def measure(self, trainer: Trainer) -> dict[str, float]:
        """Held-out metrics."""
        return self.measured(trainer.evaluate())

    def measured(self, metrics: dict[str, float]) -> dict[str, float]:
        """What an evaluation of the Trainer has found."""
        return {name: metrics[f"eval_{name}"] for name in (*self.titles, "tokens", "rows") if f"eval_{name}" in metrics}

    def details(self) -> dict[str, Any]:
        """What else is written into results.json."""
        return {}

    def save(self, folder: Path, model: Any) -> None:
        """Write what a task keeps beside the adapter: nothing, where it has no head of its own."""
        return


def prompt_form(apply_chat_template: bool, separator: str) -> dict[str, Any]:
    """How a prompt was written in training, for who asks the model; the separator counts without a template."""
    return {"apply_chat_template": apply_chat_template, "separator": separator}


def read_task_rows(data: DataArguments, seed: int, columns: tuple[str, ...]) -> TaskData:
    """Rows with the columns of a task, split as those of text: by seed, or into what two arguments name.

    Each row gets the key `where`, which names it in messages.

    Raises:
        UsageError: a file that cannot be read, or lacks a column.
    """
    check_sizes(data)
    train = _rows("data", data.data, data.data_split, data, columns)
    if data.eval_data is None:
        train, held_out = split([[row] for row in train] if len(train) > 1 else [train], data.eval_size, seed)
    else:
        held_out = _rows("eval_data", data.eval_data, data.eval_split, data, columns)
    sources = [f"data={name!r}" for name in data.data] + [f"eval_data={name!r}" for name in data.eval_data or []]
    return TaskData(train, held_out, [("columns", f"{source}: uses {', '.join(columns)}") for source in sources])


def _rows(field: str, names: list[str], split: str, data: DataArguments, columns: tuple[str, ...]) -> list[Row]:
    parts = []
    for name in names:
        rows = read_rows(name, field=field, config=data.data_config, split=split)
        known = list(dict.fromkeys(str(column) for row in rows for column in row))
        for column in columns:
            if column not in known:
                raise UsageError(
                    f"{field}={name!r} has no column {column!r}, which this task needs; its columns are {listed(known)}"
                )
        parts.append([{**row, "where": f"{field}={name!r} row {number}"} for number, row in enumerate(rows, 1)])
    return list(chain.from_iterable(parts))


def check_lengths(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, highest: int, max_length: int) -> None:
    """Check that the model has a place for each position and an embedding for each token.

    Args:
        highest: the highest token of the data.

    Raises:
        UsageError: it has not.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and max_length > longest:
        raise UsageError(f"max_length={max_length} is more than the model's {longest}; give at most that")
    embeddings: Any = model.get_input_embeddings()
    known = len(embeddings.weight)
    if max(highest, tokenizer.pad_token_id) >= known:
        raise UsageError(
            f"the tokenizer gives token {max(highest, tokenizer.pad_token_id)} and the model has embeddings for "
            f"{known:,}; give the tokenizer that belongs to the model"
        )
