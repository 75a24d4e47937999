"""Training by several ranks after an evaluation."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from peft_bridge.accelerate_private import forget_prepared


def prepare_for_training_again(trainer: Trainer) -> None:
    """Let a Trainer that has evaluated wrap its model in DDP when it trains.

    An evaluation before `train` prepares the model without DDP, and accelerate does not prepare a model twice: ranks
    would train apart, without an error.
    """
    if trainer.args.world_size == 1 or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    accelerator = trainer.accelerator
    model: Any = accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    forget_prepared(model)
    accelerator.free_memory()
    trainer.model_wrapped = model
