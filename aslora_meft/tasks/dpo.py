"""Direct preference optimisation, on trl's DPOTrainer; the reference is the base model, with the adapter disabled."""

from __future__ import annotations

from typing import Any, ClassVar

from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

from aslora_meft.adapter import ADAPTER_ERRORS, prepare_base
from aslora_meft.arguments.groups import TrainArguments
from aslora_meft.errors import UsageError, as_usage_error
from aslora_meft.tasks.task import Task, TaskData, prompt_form
from aslora_meft.tasks.trl_trainers import (
    check_cuts,
    check_pairs,
    import_trl,
    load_pairs,
    measured_evenly,
    train_in_float32,
    trl_config,
)

# trl's: its config takes any name, and its loss function alone tells which there are.
LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"),
    *("aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)


class DirectPreferenceOptimization(Task):
    """The chosen answer is to become likelier than the rejected one, compared with the base model."""

    titles: ClassVar[dict[str, str]] = {
        "loss": "loss",
        "rewards/accuracies": "pair accuracy",
        "rewards/margins": "reward margin",
    }

    def __init__(self, arguments: TrainArguments, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(arguments, tokenizer)
        self.trl = import_trl("task='dpo'")
        loss = self.options.loss_type
        if loss is not None and loss not in LOSSES:
            raise UsageError(
                f"loss_type={loss!r} is none of trl's losses; give {', '.join(LOSSES[:-1])} or {LOSSES[-1]}"
            )

    def load_data(self) -> TaskData:
        """Read, check and split the pairs."""
        data = load_pairs(self.data, self.tokenizer, self.args.seed)
        self._conversational = isinstance(data.train[0]["chosen"], list)
        return data

    def details(self) -> dict[str, Any]:
        """The form that a prompt had in training: trl puts nothing between a prompt and its answer."""
        return {"prompt_form": prompt_form(self._conversational, "")}

    def measure(self, trainer: Trainer) -> dict[str, float]:
        """Held-out metrics."""
        return measured_evenly(trainer, super().measure)

    def make_trainer(
        self, base: PreTrainedModel, adapter: PeftConfig, data: TaskData, callbacks: list[TrainerCallback]
    ) -> Trainer:
        """trl's trainer, which gets the base model and the adapter's config.

        Of a model with an adapter it would make a copy of that adapter as the reference.
        """
        import datasets

        base = prepare_base(base, adapter, gradient_checkpointing=bool(self.args.gradient_checkpointing))
        own: dict[str, Any] = {"beta": self.options.beta, "loss_type": self.options.loss_type}
        own["label_smoothing"] = self.args.label_smoothing_factor  # trl's name of it
        with as_usage_error(ImportError, *ADAPTER_ERRORS):
            args = trl_config(
                self.trl.DPOConfig,
                self.args,
                max_length=self.data.max_length,
                **{name: value for name, value in own.items() if value is not None},
            )
            trainer: Trainer = self.trl.DPOTrainer(
                model=base,
                args=args,
                train_dataset=datasets.Dataset.from_list(data.train),
                eval_dataset=datasets.Dataset.from_list(data.held_out),
                processing_class=self.tokenizer,
                peft_config=adapter,
                callbacks=callbacks,
            )
        train_in_float32(trainer.model)
        columns = ("prompt_ids", "chosen_ids", "rejected_ids")
        check_cuts(trainer, data, self.data.max_length)
        check_pairs(base, self.tokenizer, self.data.max_length, trainer, data, columns)
        return trainer
