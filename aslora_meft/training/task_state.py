"""What the checkpoints of a run tell of its task, so that no other one goes on from them, and of its ranks."""

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
    """Has the Trainer keep the task, and the number of ranks, in each checkpoint's `trainer_state.json`, under the name
    of this class.
    """

    def __init__(self, task: str, labels: list[str] | None = None) -> None:
        """
        Args:
            labels: names of a classifier's outputs.
        """
        self.task = task
        self.labels = labels
        self.ranks = 1

    def state(self) -> dict[str, Any]:
        """What is kept."""
        return {"args": {"task": self.task, "labels": self.labels}, "attributes": {"ranks": self.ranks}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the ranks; give the state of a checkpoint without a task the entry that the Trainer looks for."""
        self.ranks = args.world_size
        kept: Any = state.stateful_callbacks
        kept.setdefault(type(self).__name__, self.state())


def _entry(state: dict[str, Any]) -> dict[str, Any]:
    callbacks = state.get("stateful_callbacks")
    entry = callbacks.get(TaskState.__name__) if isinstance(callbacks, dict) else None
    return entry if isinstance(entry, dict) else {}


def ranks_of(state: dict[str, Any]) -> int | None:
    """Of how many ranks the run was that has kept a state as `trainer_state.json`; None: it does not tell."""
    attributes = _entry(state).get("attributes")
    ranks = attributes.get("ranks") if isinstance(attributes, dict) else None
    return ranks if isinstance(ranks, int) else None


def check_task(checkpoint: Path, task: str, labels: list[str] | None = None) -> None:
    """Check that a checkpoint is of the same task; one that does not tell is of any.

    Args:
        labels: names of a classifier's outputs; None: not known yet.

    Raises:
        UsageError: it is of another task, or has learnt other labels.
    """
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    kept = _entry(state).get("args")
    if not isinstance(kept, dict):
        return
    if kept.get("task") != task:
        raise UsageError(f"task={task} differs from the checkpoint's task={kept.get('task')}; resume with that")
    if labels is not None and kept.get("labels") != labels:
        raise UsageError(
            f"the data has the labels {listed(labels)} and the checkpoint's are {listed(kept.get('labels') or [])}; "
            "resume with the data that it was trained on"
        )
