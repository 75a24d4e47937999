"""Training by several ranks: after an evaluation, in a checkpoint, and when one of them ends."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_bridge.accelerate_private import forget_prepared

# Seconds in which a launcher finds the rank that ended first, and not another one that has ended since.
_LAUNCHER_LOOKS = 1.0
# What errors of gloo, of NCCL, of torch's store and of MEFT say when another rank is gone.
_LOST = (
    "gloo/", "remote process exited", "Connection closed", "Connection reset", "Broken pipe", "shares MEFT's rows",
)  # fmt: skip


class FirstEvaluation(TrainerCallback):
    """Keeps what an evaluation has found before the first step, for engines that prepare the model with its optimizer.

    FSDP2 and DeepSpeed cannot evaluate before they train, so the Trainer does it as it begins.

    Attributes:
        metrics: of the Trainer; empty before the evaluation.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.metrics: dict[str, float] = {}
        trainer.args.eval_on_start = True
        trainer.add_callback(self)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the first."""
        self.metrics = self.metrics or dict(kwargs["metrics"])


def evaluates_when_it_trains(trainer: Trainer) -> bool:
    """Whether the Trainer's engine prepares the model together with its optimizer alone."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def prepare_for_training_again(trainer: Trainer) -> None:
    """Let a Trainer that has evaluated wrap its model in DDP when it trains.

    An evaluation before `train` prepares the model without DDP, and accelerate does not prepare a model twice: ranks
    would train apart, without an error.
    """
    if trainer.args.world_size == 1:
        return
    accelerator = trainer.accelerator
    model: Any = accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    forget_prepared(model)
    accelerator.free_memory()
    trainer.model_wrapped = model


def wait_for_all_in_saves(trainer: Trainer) -> None:
    """Let the first rank finish a checkpoint, and delete older ones, when all ranks have written their parts.

    The Trainer's does not wait: if another rank ended before it wrote its state, no whole checkpoint might be left.
    """
    if trainer.args.world_size == 1:
        return
    save_random_state = trainer._save_rng_state  # what every rank writes last

    def save(output_dir: str) -> None:
        save_random_state(output_dir)
        torch.distributed.barrier()

    trainer._save_rng_state = save  # type: ignore[method-assign]


@contextmanager
def lost_ranks_in_one_sentence() -> Iterator[None]:
    """Say in one sentence that another rank has ended, which torch's collectives tell by a page of calls.

    Raises:
        SystemExit: with code 2, instead of the error of a collective, or of MEFT's own waits for other ranks.
    """
    try:
        yield
    except RuntimeError as error:
        words = " ".join(str(error).split())
        if not any(sign in words for sign in _LOST):
            raise
        if len(words) > 500:
            words = f"{words[:200]} ... {words[-300:]}"
        rank = os.environ.get("RANK", "0")
        print(
            f"aslora-meft: error: rank {rank} has lost another rank of the run: the messages of the one that ended "
            "first say why; start all ranks again, with --resume_from_checkpoint last to go on from the last "
            f"checkpoint ({words})",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(_LAUNCHER_LOOKS)
        raise SystemExit(2) from error
