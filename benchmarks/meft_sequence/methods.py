"""The methods of `benchmarks.meft_sequence`: those of `benchmarks.meft_forgetting`, some of which know their task."""

from dataclasses import dataclass

from torch import nn

import meft
from benchmarks.meft_forgetting import methods


@dataclass(frozen=True)
class Method(methods.Method):
    """An adapter that learns tasks one after the other.

    Attributes:
        tasks: whether the method is told which task it learns and is asked for. MEFT then gives each task rows of its
            own, LoRA an adapter of its own; without it one adapter is trained on.
        chosen_by: which loss chooses the learning rate: where no task is told ("untold"), or where all are ("told").
    """

    tasks: bool = False
    chosen_by: str = "untold"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.background_text == "other text" or self.replay:
            raise ValueError(f"{self.name}: background_text='other text' and replay=True are of meft_forgetting alone.")
        if self.tasks and self.kind == "dense":
            raise ValueError(f"{self.name}: tasks=True goes with kind='lora' and kind='meft'.")
        if self.chosen_by not in ("untold", "told") or (self.chosen_by == "told" and not self.tasks):
            raise ValueError(f"{self.name}: chosen_by='{self.chosen_by}' must be 'untold', or 'told' with tasks=True.")

    def begin(self, model: nn.Module, task: str) -> None:
        """Train a task from now on."""
        if self.tasks and self.kind == "lora":
            model.add_adapter(task, model.peft_config["default"])  # which itself is never trained
            model.set_adapter(task)
        elif self.tasks:
            meft.select_task(model, None)

    def end(self, model: nn.Module, task: str) -> None:
        """The task is learned."""
        if self.tasks and self.kind == "meft":
            meft.freeze_rows(model, task)

    def select(self, model: nn.Module, task: str) -> None:
        """Ask for a task that is learned. With the last one the model is as the last training has left it."""
        if self.tasks and self.kind == "lora":
            model.set_adapter(task)
        elif self.tasks:
            meft.select_task(model, task)
