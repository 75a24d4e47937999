"""Ctrl-C in a run: the step is finished, a checkpoint is saved, and the run says how to go on."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Interrupted(KeyboardInterrupt):
    """A run was stopped by Ctrl-C; the message says how to go on."""


class StopAtStep(TrainerCallback):
    """Turns the first Ctrl-C of a training run into a checkpoint after the step; the second one stops at once.

    In a run of several processes Ctrl-C stays what it is: they would not stop after the same step.

    Attributes:
        step: the step after which the run was stopped; None: it was not.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self._asked = False
        self._handler: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take Ctrl-C over."""
        if args.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        self.give_back()  # the next one stops at once
        self._asked = True
        print("\nStopping after this step; press Ctrl-C again to stop at once.", file=sys.stderr, flush=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop if Ctrl-C was pressed."""
        if self._asked and self.step is None:
            self.step = state.global_step
            args.save_only_model = False  # else nobody can go on from it
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give Ctrl-C back."""
        self.give_back()

    def give_back(self) -> None:
        """Restore what Ctrl-C did before the run."""
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None
