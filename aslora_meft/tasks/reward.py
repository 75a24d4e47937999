"""A reward model, on trl's RewardTrainer: one score a text, higher for the chosen answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

from aslora_meft.arguments.groups import TrainArguments
from aslora_meft.errors import UsageError, as_usage_error
from aslora_meft.tasks.heads import load_with_head, save_config, with_head
from aslora_meft.tasks.task import Task, TaskData
from aslora_meft.tasks.trl_trainers import (
    check_pairs,
    import_trl,
    load_pairs,
    measured_evenly,
    train_in_float32,
    trl_config,
)


class RewardModel(Task):
    """The score of the chosen answer is to be above that of the rejected one."""

    titles: ClassVar[dict[str, str]] = {"loss": "loss", "accuracy": "pair accuracy", "margin": "reward margin"}

    def __init__(self, arguments: TrainArguments, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(arguments, tokenizer)
        self.trl = import_trl("task='reward'")
        if self.args.label_smoothing_factor:
            given = self.args.label_smoothing_factor
            raise UsageError(f"label_smoothing_factor={given} has no effect with task='reward'; drop it")
        self._new_modules: list[str] = []

    def load_data(self) -> TaskData:
        """Read, check and split the pairs."""
        return load_pairs(self.data, self.tokenizer, self.args.seed)

    def measure(self, trainer: Trainer) -> dict[str, float]:
        """Held-out metrics."""
        return measured_evenly(trainer, super().measure)

    def load_model(self, device: torch.device) -> PreTrainedModel:
        """The base model with a head of one output."""
        model, self._new_modules = load_with_head(self.model, device, ["reward"], self.tokenizer, self.args.seed)
        return model

    def make_trainer(
        self, base: PreTrainedModel, adapter: PeftConfig, data: TaskData, callbacks: list[TrainerCallback]
    ) -> Trainer:
        """trl's trainer."""
        return self.trainer_of(self.adapted(base, with_head(adapter, self._new_modules)), data, callbacks)

    def trainer_of(self, model: Any, data: TaskData, callbacks: list[TrainerCallback]) -> Trainer:
        """The trainer of a model that has its adapter, for the pairs that are left of `max_length`."""
        import datasets

        with as_usage_error(ValueError, ImportError, TypeError):
            trainer: Trainer = self.trl.RewardTrainer(
                model=model,
                args=trl_config(self.trl.RewardConfig, self.args, max_length=self.data.max_length),
                train_dataset=datasets.Dataset.from_list(data.train),
                eval_dataset=datasets.Dataset.from_list(data.held_out),
                processing_class=self.tokenizer,
                callbacks=callbacks,
            )
        train_in_float32(model)
        columns = ("chosen_ids", "rejected_ids")
        check_pairs(model.get_base_model(), self.tokenizer, self.data.max_length, trainer, data, columns)
        return trainer

    def save(self, folder: Path, model: Any) -> None:
        """Write the base model's configuration with the head's outputs."""
        save_config(folder, model)
