"""The tasks by their names."""

from aslora_meft.tasks.classification import Classification
from aslora_meft.tasks.dpo import DirectPreferenceOptimization
from aslora_meft.tasks.reward import RewardModel
from aslora_meft.tasks.seq2seq import SequenceToSequence
from aslora_meft.tasks.sft import SupervisedFineTuning
from aslora_meft.tasks.task import Task

TASKS: dict[str, type[Task]] = {
    "sft": SupervisedFineTuning,
    "dpo": DirectPreferenceOptimization,
    "reward": RewardModel,
    "classification": Classification,
    "seq2seq": SequenceToSequence,
}
