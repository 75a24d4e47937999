"""Run events from `transformers.Trainer`, with nothing for the user to pass: how long a run will be, and its end."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback


class RunListener:
    """A module that a Trainer's run concerns; it is found inside the model that the Trainer trains.

    A base class and not a protocol: PEFT's wrappers forward unknown attributes, so all of them would seem to comply.
    """

    @property
    def follows_engine(self) -> bool:
        """Whether the listener hears of the steps of the DeepSpeed engine that holds the model."""
        return False

    def check_run(self, arguments: Any) -> None:
        """Refuse a run with these `transformers.TrainingArguments`, before it begins."""

    def on_run_begin(self, total_steps: int, done_steps: int, steps_seen: bool) -> None:
        """A run of `total_steps` optimizer steps begins.

        Args:
            done_steps: steps of it that were taken before, where it is resumed from a checkpoint; else 0.
            steps_seen: whether its steps are seen, by torch's optimizer hooks or because `follows_engine`.
        """

    def log_scalars(self) -> dict[str, float]:
        """Numbers to add to what a Trainer logs."""
        return {}

    def on_run_end(self) -> None:
        """The run has ended."""

    def update_and_allocate(self, global_step: int) -> None:
        """Optimizer step `global_step` (1-indexed) was taken by an engine that torch's optimizer hooks cannot see."""


def watch_runs() -> None:
    """Let every Trainer made from now on tell the `RunListener`s in its model; repeated calls change nothing."""
    # Imported on use: only needed where there is a model to train.
    import transformers.trainer as trainer

    if RunEvents not in trainer.DEFAULT_CALLBACKS:
        trainer.DEFAULT_CALLBACKS.append(RunEvents)  # type: ignore[arg-type]


def _listeners(model: nn.Module | None) -> list[RunListener]:
    return [m for m in model.modules() if isinstance(m, RunListener)] if model is not None else []


def check_not_data_parallel(arguments: Any, model: Any) -> None:
    """Raises: ValueError: a Trainer with these `transformers.TrainingArguments` would take `nn.DataParallel`."""
    gpus = getattr(arguments, "n_gpu", 1)  # 1 too where the model is spread over them
    if gpus > 1 and not any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8)):
        raise ValueError(
            f"One process sees {gpus} GPUs, for which a Trainer takes nn.DataParallel, which ASLoRA and MEFT do not "
            f"support: start it with torchrun --nproc_per_node={gpus}, or set CUDA_VISIBLE_DEVICES=0."
        )


def _hidden_from_hooks(optimizer: Any) -> bool:
    """DeepSpeed's optimizers hold flattened copies of the parameters, which the step hooks cannot recognise."""
    return "deepspeed" in f"{type(optimizer).__module__}.{type(optimizer).__name__}".lower()


class RunEvents(TrainerCallback):
    """The callback behind `watch_runs`."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        for listener in _listeners(model):
            check_not_data_parallel(args, model)
            listener.check_run(args)
        for listener in _listeners(model):
            seen = listener.follows_engine or not _hidden_from_hooks(optimizer)
            listener.on_run_begin(state.max_steps, state.global_step, seen)

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if _hidden_from_hooks(optimizer):
            for listener in _listeners(model):
                if not listener.follows_engine:
                    listener.update_and_allocate(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kwargs: Any) -> None:
        # The Trainer's defaults come first among the callbacks: whoever reports sees these scalars too.
        scalars = {name: value for listener in _listeners(model) for name, value in listener.log_scalars().items()}
        if scalars and logs is not None and "loss" in logs:
            logs.update(scalars)
            state.log_history[-1].update(scalars)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if getattr(args, "load_best_model_at_end", False) and state.best_model_checkpoint:
            return  # the model is that of an earlier step by now
        for listener in _listeners(model):
            listener.on_run_end()
