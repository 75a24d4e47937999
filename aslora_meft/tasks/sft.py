"""Supervised fine-tuning: text or answers, on transformers' Trainer; packed by trl where that is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, Trainer, TrainerCallback

from aslora_meft.data.samples import IGNORED, Sample, load_samples
from aslora_meft.errors import UsageError
from aslora_meft.tasks.metrics import token_metrics, token_sums
from aslora_meft.tasks.task import Task, TaskData, check_lengths, prompt_form
from aslora_meft.tasks.trl_trainers import import_trl


class SupervisedFineTuning(Task):
    """Next-token loss on text, or on answers alone."""

    titles: ClassVar[dict[str, str]] = {"loss": "loss", "perplexity": "perplexity", "accuracy": "token accuracy"}

    def load_data(self) -> TaskData:
        """Read, tokenise and split the data."""
        if self.options.packing:
            import_trl("packing=True")
            if self.args.use_cache:
                raise UsageError("packing=True needs use_cache=False, as a cache joins packed samples; drop one")
        samples = load_samples(self.data, self.tokenizer, self.args.seed)
        lines = [(name, _counted(part)) for name, part in (("train", samples.train), ("held out", samples.held_out))]
        kind = samples.sources[0].format.kind
        self._prompt_form = prompt_form(kind == "messages", self.data.separator if kind == "prompt" else "")
        for source in samples.sources:
            lines.append(("columns", f"{source.where}: {source.format}"))
            lines += [("note", note) for note in source.notes]
        return TaskData(samples.train, samples.held_out, lines)

    def make_trainer(
        self, base: PreTrainedModel, adapter: PeftConfig, data: TaskData, callbacks: list[TrainerCallback]
    ) -> Trainer:
        """The Trainer of transformers."""
        highest = max(max(sample["input_ids"]) for sample in (*data.train, *data.held_out))
        check_lengths(base, self.tokenizer, highest, self.data.max_length)
        train: Any = data.train
        collate: Any = DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=IGNORED)
        if self.options.packing:
            _check_packs(base)
            train, collate = _packed(data.train, self.data.max_length, self.tokenizer.pad_token_id)
            data.lines.append(("packing", f"{len(data.train):,} samples in {len(train):,} sequences"))
            self.args.remove_unused_columns = False  # the lengths of what is packed
        return self.plain_trainer(
            self.adapted(base, adapter),
            data,
            callbacks,
            train_dataset=train,
            data_collator=collate,
            compute_metrics=token_metrics,
            preprocess_logits_for_metrics=token_sums,
        )

    def details(self) -> dict[str, Any]:
        """The form that a prompt had in training: that of the first source."""
        return {"prompt_form": self._prompt_form}


def _counted(samples: Sequence[Sample]) -> str:
    tokens = sum(len(sample["input_ids"]) for sample in samples)
    learnt = sum(label != IGNORED for sample in samples for label in sample["labels"])
    return f"{len(samples):,} samples, {tokens:,} tokens, {learnt:,} of them learnt"


def _packed(samples: list[Sample], max_length: int, pad_token_id: int) -> tuple[list[dict[str, Any]], Any]:
    """Sequences of several samples each, by trl's best-fit, and the collator that keeps the samples in them apart."""
    import datasets
    from trl import pack_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    packed = pack_dataset(datasets.Dataset.from_list([dict(sample) for sample in samples]), max_length, "bfd")
    return packed.to_list(), DataCollatorForLanguageModeling(pad_token_id=pad_token_id, padding_free=True)


@torch.no_grad()
def _check_packs(model: PreTrainedModel) -> None:
    """Raises: UsageError: what a model says of a sequence depends on another one that is packed with it."""
    ids = torch.arange(1, 9, device=model.device)[None]
    positions = torch.arange(4, device=model.device).repeat(2)[None]
    training = model.training
    model.eval()
    try:
        alone = model(input_ids=ids[:, 4:], position_ids=positions[:, 4:], use_cache=False).logits
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 4:]
        apart = torch.allclose(alone, packed, rtol=1e-2, atol=1e-2 * float(alone.abs().max()))
    except TypeError:  # it takes no positions
        apart = False
    finally:
        model.train(training)
    if not apart:
        raise UsageError(
            f"packing=True needs a model whose attention keeps packed samples apart, which {type(model).__name__} does "
            "not; drop it"
        )
