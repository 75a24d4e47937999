"""Classification of texts, or of pairs of texts, on transformers' Trainer."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from peft import PeftConfig
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)

from aslora_meft.arguments.groups import TrainArguments
from aslora_meft.data.files import Row
from aslora_meft.data.formats import text_of
from aslora_meft.errors import UsageError, as_usage_error
from aslora_meft.tasks.heads import load_with_head, save_config, with_head
from aslora_meft.tasks.task import Task, TaskData, check_lengths, read_task_rows


class Classification(Task):
    """Cross entropy of one label a row."""

    titles: ClassVar[dict[str, str]] = {"loss": "loss", "accuracy": "accuracy", "f1": "macro F1"}

    def __init__(
        self, arguments: TrainArguments, tokenizer: PreTrainedTokenizerBase, labels: list[str] | None = None
    ) -> None:
        """
        Args:
            labels: names of the outputs; None: the labels of the training data, sorted.
        """
        super().__init__(arguments, tokenizer)
        self.labels = labels or []
        self._new_modules: list[str] = []

    def load_data(self) -> TaskData:
        """Read, tokenise and split the rows."""
        data = self.data
        pair = data.text_pair_column
        columns = (data.text_column, *([pair] if pair else []), data.label_column)
        read = read_task_rows(data, self.args.seed, columns)
        known = [] if data.eval_data is None else read.held_out
        learnt = [_label(row, data.label_column) for row in (*read.train, *(() if known else read.held_out))]
        if not self.labels:
            self.labels = sorted(set(learnt), key=lambda label: (not _is_integer(label), _order(label), label))
        if len(self.labels) < 2:
            raise UsageError(f"label_column={data.label_column!r} holds one label alone, {self.labels[0]!r}; give two")
        ids = {label: index for index, label in enumerate(self.labels)}
        train, held_out = ([self._encoded(row, ids) for row in part] for part in (read.train, read.held_out))
        shown = ", ".join(self.labels[:12]) + (f" and {len(ids) - 12} more" if len(ids) > 12 else "")
        cut = sum(len(item["input_ids"]) == data.max_length for item in (*train, *held_out))
        lines = [("train", f"{len(train):,} rows"), ("held out", f"{len(held_out):,} rows"), ("labels", shown)]
        lines += [("note", f"{cut} rows have max_length={data.max_length} tokens or are cut there")] if cut else []
        return TaskData(train, held_out, [*lines, *read.lines])

    def _encoded(self, row: Row, ids: dict[str, int]) -> dict[str, Any]:
        data = self.data
        label = _label(row, data.label_column)
        if label not in ids:
            raise UsageError(
                f"{row['where']}: label {label!r} is none of the {len(ids)} that were learnt; correct it or delete the "
                "row"
            )
        texts = [text_of(row, name, row["where"]) for name in (data.text_column, data.text_pair_column) if name]
        with as_usage_error(Exception, prefix=f"{row['where']} cannot be tokenised: "):
            encoded = dict(self.tokenizer(*texts, truncation=True, max_length=data.max_length))
        return encoded | {"labels": ids[label]}

    def load_model(self, device: torch.device) -> PreTrainedModel:
        """The base model with an output for each label."""
        model, self._new_modules = load_with_head(self.model, device, self.labels, self.tokenizer, self.args.seed)
        return model

    def make_trainer(
        self, base: PreTrainedModel, adapter: PeftConfig, data: TaskData, callbacks: list[TrainerCallback]
    ) -> Trainer:
        """The Trainer of transformers."""
        base.config.problem_type = "single_label_classification"
        return self.trainer_of(self.adapted(base, with_head(adapter, self._new_modules)), data, callbacks)

    def trainer_of(self, model: Any, data: TaskData, callbacks: list[TrainerCallback]) -> Trainer:
        """The Trainer of a model that has its adapter, for rows that fit the model."""
        rows = [row["input_ids"] for row in (*data.train, *data.held_out)]
        check_lengths(model.get_base_model(), self.tokenizer, max(chain.from_iterable(rows)), max(map(len, rows)))
        return self.plain_trainer(
            model,
            data,
            callbacks,
            data_collator=DataCollatorWithPadding(self.tokenizer),
            compute_metrics=classification_metrics,
            preprocess_logits_for_metrics=_logits_alone,
        )

    def details(self) -> dict[str, Any]:
        """The labels, in the order of the outputs."""
        return {"labels": self.labels}

    def save(self, folder: Path, model: Any) -> None:
        """Write the base model's configuration with the labels."""
        save_config(folder, model)


def _label(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise UsageError(f"{row['where']}: column {column!r} has no label; fill it or delete the row")
    if not isinstance(value, str | int):
        raise UsageError(
            f"{row['where']}: column {column!r} holds {type(value).__name__}, not a label; give a name or an integer"
        )
    return str(value).strip()


def _is_integer(label: str) -> bool:
    return label.removeprefix("-").isdecimal() and len(label) < 20


def _order(label: str) -> int:
    return int(label) if _is_integer(label) else 0


def _logits_alone(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Encoder-decoders put states behind their logits."""
    return logits[0] if isinstance(logits, tuple) else logits


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, and the mean of the labels' F1 over those that occur among predictions or truths."""
    guessed, true = np.asarray(prediction.predictions).argmax(-1), np.asarray(prediction.label_ids)
    scores = []
    for label in np.union1d(guessed, true):
        right = int(((guessed == label) & (true == label)).sum())
        scores.append(2 * right / int((guessed == label).sum() + (true == label).sum()))
    return {"accuracy": float((guessed == true).mean()), "f1": float(np.mean(scores)), "rows": len(true)}
