"""What a run teaches: the task, its own options, and which fields have a meaning with it."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from aslora_meft.errors import UsageError

# Task -> PEFT's type of it, which also says what kind of model is loaded.
TASK_TYPES = {
    "sft": "CAUSAL_LM",
    "dpo": "CAUSAL_LM",
    "reward": "SEQ_CLS",
    "classification": "SEQ_CLS",
    "seq2seq": "SEQ_2_SEQ_LM",
}
# Peak learning rates of adapters; that of DPO is the one that trl's documentation names.
LEARNING_RATES = {"dpo": 1e-5}
_MEANT_FOR = {
    **dict.fromkeys(("prompt_column", "completion_column", "separator"), ("sft",)),
    **dict.fromkeys(("apply_chat_template", "completion_only", "packing"), ("sft",)),
    **dict.fromkeys(("beta", "loss_type"), ("dpo",)),
    **dict.fromkeys(("source_column", "target_column"), ("seq2seq",)),
    **dict.fromkeys(("label_column", "text_pair_column"), ("classification",)),
    "text_column": ("sft", "classification"),
}


@dataclass
class TaskArguments:
    """What is learnt, and the options that a task has beside the Trainer's."""

    _argument_group_name = "task"
    task: Literal["sft", "dpo", "reward", "classification", "seq2seq"] = field(
        default="sft",
        metadata={
            "help": "sft: text or answers. dpo, reward: preference pairs (prompt, chosen, rejected), with trl. "
            "classification: text and label. seq2seq: source and target, on an encoder-decoder model."
        },
    )
    packing: bool = field(
        default=False,
        metadata={"help": "sft: put rows together into sequences of max_length without padding, with trl."},
    )
    beta: float | None = field(
        default=None, metadata={"help": "dpo: strength of the bond to the base model. None: trl's default, 0.1."}
    )
    loss_type: str | None = field(
        default=None, metadata={"help": "dpo: trl's name of the loss, such as ipo. None: trl's default, sigmoid."}
    )


def check_task(task: TaskArguments, *others: Any) -> None:
    """Check that each field that was set has a meaning with the task.

    Args:
        others: instances of the other groups' dataclasses.

    Raises:
        UsageError: one that has none, or a value out of its range.
    """
    for group in (task, *others):
        for item in dataclasses.fields(group):
            value = getattr(group, item.name)
            tasks = _MEANT_FOR.get(item.name, (task.task,))
            if task.task not in tasks and value != item.default:
                remedy = f"drop it or use task={' or '.join(tasks)}"
                raise UsageError(f"{item.name}={value} has no meaning with task={task.task}; {remedy}")
    if task.beta is not None and not 0 < task.beta < 1e6:
        raise UsageError(f"beta={task.beta} is out of range; give a positive number such as 0.1")
