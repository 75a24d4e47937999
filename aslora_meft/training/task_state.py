"""What the checkpoints of a run tell of its task, so that no other one goes on from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from aslora_meft.data.formats import listed
from aslora_meft.errors import UsageError


class TaskState(TrainerCallback, ExportableState):
    """Has the Trainer keep the task in each checkpoint's `trainer_state.json`, under the name of this class."""

    def __init__(self, task: str, labels: list[str] | None = None) -> None:
        """
        Args:
            labels: names of a classifier's outputs.
        """
        self.task = task
        self.labels = labels

    def state(self) -> dict[str, Any]:
        """What is kept."""
        return {"args": {"task": self.task, "labels": self.labels}, "attributes": {}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the state of a checkpoint without a task the entry that the Trainer looks for when it saves."""
        kept: Any = state.stateful_callbacks
        kept.setdefault(type(self).__name__, self.state())


def check_task(checkpoint: Path, task: str, labels: list[str] | None = None) -> None:
    """Check that a checkpoint is of the same task; one that does not tell is of any.

    Args:
        labels: names of a classifier's outputs; None: not known yet.

    Raises:
        UsageError: it is of another task, or has learnt other labels.
    """
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    callbacks = state.get("stateful_callbacks")
    entry = callbacks.get(TaskState.__name__) if isinstance(callbacks, dict) else None
    kept = entry.get("args") if isinstance(entry, dict) else None
    if not isinstance(kept, dict):
        return
    if kept.get("task") != task:
        raise UsageError(f"task={task} differs from the checkpoint's task={kept.get('task')}; resume with that")
    if labels is not None and kept.get("labels") != labels:
        raise UsageError(
            f"the data has the labels {listed(labels)} and the checkpoint's are {listed(kept.get('labels') or [])}; "
            "resume with the data that it was trained on"
        )
