"""Source to target on encoder-decoder models, on transformers' Trainer."""

from __future__ import annotations

from functools import partial
from itertools import chain
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, Trainer, TrainerCallback

from aslora_meft.adapter import load_model
from aslora_meft.data.files import Row
from aslora_meft.data.formats import text_of
from aslora_meft.data.samples import IGNORED
from aslora_meft.tasks.metrics import token_metrics, token_sums
from aslora_meft.tasks.task import Task, TaskData, check_lengths, read_task_rows


class SequenceToSequence(Task):
    """Next-token loss of the decoder on the target."""

    titles: ClassVar[dict[str, str]] = {"loss": "loss", "perplexity": "perplexity", "accuracy": "token accuracy"}

    def load_data(self) -> TaskData:
        """Read, tokenise and split the rows."""
        columns = (self.data.source_column, self.data.target_column)
        read = read_task_rows(self.data, self.args.seed, columns)
        train, held_out = ([self._encoded(row) for row in part] for part in (read.train, read.held_out))
        tokens = sum(len(row["labels"]) for row in train)
        lines = [("train", f"{len(train):,} rows, {tokens:,} tokens learnt"), ("held out", f"{len(held_out):,} rows")]
        return TaskData(train, held_out, lines + read.lines)

    def _encoded(self, row: Row) -> dict[str, Any]:
        tokenizer: Any = self.tokenizer
        limit = self.data.max_length
        source = text_of(row, self.data.source_column, row["where"])
        target = text_of(row, self.data.target_column, row["where"])
        encoded = tokenizer(source, truncation=True, max_length=limit)
        labels = tokenizer(text_target=target)["input_ids"]
        if tokenizer.eos_token_id is not None and labels[-1:] != [tokenizer.eos_token_id]:
            labels = [*labels, tokenizer.eos_token_id]  # where the decoder is to stop
        parts = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        return parts | {"labels": labels[:limit]}

    def load_model(self, device: torch.device) -> PreTrainedModel:
        """The encoder-decoder."""
        return load_model(self.model, device, "SEQ_2_SEQ_LM")

    def make_trainer(
        self, base: PreTrainedModel, adapter: PeftConfig, data: TaskData, callbacks: list[TrainerCallback]
    ) -> Trainer:
        """The Trainer of transformers."""
        return self.trainer_of(self.adapted(base, adapter), data, callbacks)

    def trainer_of(self, model: Any, data: TaskData, callbacks: list[TrainerCallback]) -> Trainer:
        """The Trainer of a model that has its adapter, for rows that fit the model."""
        rows = [row[name] for row in (*data.train, *data.held_out) for name in ("input_ids", "labels")]
        check_lengths(model.get_base_model(), self.tokenizer, max(chain.from_iterable(rows)), max(map(len, rows)))
        return self.plain_trainer(
            model,
            data,
            callbacks,
            data_collator=DataCollatorForSeq2Seq(self.tokenizer, model=model, label_pad_token_id=IGNORED),
            compute_metrics=token_metrics,
            preprocess_logits_for_metrics=partial(token_sums, next_token=False),
        )
