"""The arguments of ``aslora-meft train`` and how they are read from a YAML file and the command line."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from peft import PeftConfig
from transformers import TrainingArguments

from aslora_meft.arguments.checks import check_evaluation, check_numbers
from aslora_meft.arguments.config_arguments import METHODS, add_config_arguments, make_config
from aslora_meft.arguments.parser import CommandParser
from aslora_meft.arguments.task_arguments import LEARNING_RATES, TASK_TYPES, TaskArguments, check_task
from aslora_meft.arguments.text import local_path
from aslora_meft.errors import UsageError, as_usage_error


def _doc(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(kw_only=True)
class BaseWeights:
    """How the base model's weights are loaded."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata=_doc("Type of the base weights; auto: the one that they were saved in, on a CPU float32."),
    )
    load_in_4bit: bool = field(default=False, metadata=_doc("Quantise the base weights to NF4 with bitsandbytes."))
    load_in_8bit: bool = field(default=False, metadata=_doc("Quantise the base weights to INT8 with bitsandbytes."))
    trust_remote_code: bool = field(
        default=False, metadata=_doc("Run Python code that the model's folder or repository brings along.")
    )


@dataclass(kw_only=True)
class ModelArguments(BaseWeights):
    """Which model is fine-tuned, and by which method."""

    _argument_group_name = "model"
    model: str = field(metadata=_doc("Folder or hub id of a language model of the kind that the task needs."))
    method: str = field(default="aslora", metadata={**_doc("PEFT method of the adapter."), "choices": tuple(METHODS)})


@dataclass
class DataArguments:
    """What is learnt and what is held out."""

    _argument_group_name = "data"
    data: list[str] = field(
        metadata=_doc(
            "Files (.jsonl, .json, .csv, .tsv, .txt, .parquet; text also with .gz) or hub ids. Columns: messages, "
            "conversations, prompt + completion, instruction + output, or text; of other tasks see --task."
        )
    )
    eval_data: list[str] | None = field(
        default=None, metadata=_doc("Held-out files or hub ids. None: split off from --data.")
    )
    eval_size: float = field(
        default=0.1, metadata=_doc("Held out from --data by a seeded split: a share (< 1) or a number of rows.")
    )
    data_config: str | None = field(default=None, metadata=_doc("Configuration name of a data set on the hub."))
    data_split: str = field(default="train", metadata=_doc("Split of --data on the hub."))
    eval_split: str = field(default="test", metadata=_doc("Split of --eval_data on the hub."))
    prompt_column: str = field(default="prompt", metadata=_doc("Column with the prompt."))
    completion_column: str = field(default="completion", metadata=_doc("Column with what the model shall answer."))
    text_column: str = field(default="text", metadata=_doc("Column with text that is learnt whole, or classified."))
    text_pair_column: str | None = field(
        default=None, metadata=_doc("classification: column with a second text, such as a hypothesis.")
    )
    label_column: str = field(default="label", metadata=_doc("classification: column with names or integers."))
    source_column: str = field(default="source", metadata=_doc("seq2seq: column with what the encoder reads."))
    target_column: str = field(default="target", metadata=_doc("seq2seq: column with what the decoder shall write."))
    separator: str = field(default="\n", metadata=_doc("Text between prompt and completion, part of the prompt."))
    apply_chat_template: bool = field(
        default=False, metadata=_doc("Put prompt and completion into the model's chat template as two turns.")
    )
    completion_only: bool = field(
        default=True, metadata=_doc("Loss on the completion (in messages: on the assistant's turns) alone.")
    )
    max_length: int = field(
        default=512, metadata=_doc("Tokens a row: text is cut into windows, other rows at the end.")
    )


@dataclass
class TrainerArguments(TrainingArguments):
    """transformers' TrainingArguments with defaults that suit adapters.

    The learning rate is 1e-3: adapters of models below a billion parameters learn little at full fine-tuning's rates.
    Take 2e-4 or so from 7 billion on.
    """

    _argument_group_name = "trainer (transformers.TrainingArguments)"
    output_dir: str = field(metadata=_doc("New or empty folder for the adapter, its tokenizer and the checkpoints."))
    learning_rate: float = field(default=1e-3, metadata=_doc("Peak learning rate; 2e-4 or so from 7 billion on."))
    warmup_steps: float = field(default=0.06, metadata=_doc("Warm-up: steps, or below 1 a share of the run."))
    gradient_checkpointing: bool | None = field(
        default=None, metadata=_doc("Compute activations again in the backward pass instead of keeping them.")
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata=_doc("A checkpoint's folder, or last: the newest whole one in output_dir.")
    )
    logging_steps: float = field(
        default=10, metadata=_doc("Log every so many steps, or below 1 that share of the run.")
    )

    def __post_init__(self) -> None:
        """Keep what transformers and torch would warn of in every run from happening."""
        if getattr(self, "activation_checkpointing", False) is None:  # the newer name
            self.activation_checkpointing, self.gradient_checkpointing = self.gradient_checkpointing, None
        super().__post_init__()
        # Page-locked memory only where there is a device to copy to.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()


class TrainArguments(NamedTuple):
    """All arguments of a training run."""

    model: ModelArguments
    adapter: PeftConfig
    data: DataArguments
    trainer: TrainerArguments
    task: TaskArguments


_DEEPEST = 50  # levels of a YAML file
_LARGEST = 2**17  # bytes of it: yaml reads some ten thousand words a second
_GROUPS: tuple[Any, ...] = (ModelArguments, TaskArguments, DataArguments, TrainerArguments)
_COMMON = (
    *("method", "task", "r", "lora_alpha", "aslora_dropout", "lora_dropout", "top_k", "target_modules", "dtype"),
    *("load_in_4bit", "eval_data", "max_length", "learning_rate", "num_train_epochs", "max_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "seed"),
    "resume_from_checkpoint",
)


def parse_train(argv: list[str]) -> TrainArguments:
    """Read ``[CONFIG.yaml] [--name value ...]``; the command line wins over the file, the file over the defaults.

    Raises:
        UsageError: an unknown or missing argument, or a value that is not allowed.
    """
    parser = CommandParser(
        _GROUPS,
        prog="aslora-meft train",
        usage="aslora-meft train [CONFIG.yaml] [--name value ...]",
        description="Fine-tune a language model with an adapter, evaluate it before and after, and save it.\n"
        "CONFIG.yaml holds the same names, one 'name: value' a line.",
        example="aslora-meft train --model MODEL --data train.jsonl --output_dir out --r 16 --num_train_epochs 1",
        common=_COMMON,
    )
    add_config_arguments(parser, METHODS)
    if argv and not argv[0].startswith("-"):
        argv = [*_yaml_arguments(local_path("CONFIG.yaml", argv[0]), parser), *argv[1:]]
    values = parser.read(argv)
    if values["task"] in LEARNING_RATES:
        parser.set_defaults(learning_rate=LEARNING_RATES[values["task"]])
        values = parser.read(argv)
    # TrainingArguments checks its own values when it is built.
    with as_usage_error(Exception):
        model, task, data, trainer = (
            group(**{item.name: values.pop(item.name) for item in dataclasses.fields(group) if item.init})
            for group in _GROUPS
        )
    check_numbers(trainer)
    check_evaluation(trainer)
    check_task(task, data)
    if model.load_in_4bit and model.load_in_8bit:
        raise UsageError("load_in_8bit=True excludes load_in_4bit=True; give one of them")
    adapter = make_config(model.method, values, TASK_TYPES[task.task])
    return TrainArguments(model, adapter, data, trainer, task)


class _FieldsLoader(yaml.BaseLoader):
    """Leaves every scalar as written: "no" and "1e-3" mean what they mean on the command line; each key stands once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Make a mapping.

        Raises:
            yaml.YAMLError: a key stands twice, of which yaml would take the last.
        """
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in found if keys.count(key) > 1]:
            raise yaml.YAMLError(f"the field {twice[0]!r} stands twice; keep one")
        return found


def _yaml_arguments(path: Path, parser: CommandParser) -> list[str]:
    """The file's fields as command-line words, so that both are checked by one parser."""
    with as_usage_error(OSError, prefix=f"the configuration file {str(path)!r} cannot be read: "):
        if not path.is_file():
            raise UsageError(
                f"the configuration file {str(path)!r} does not exist; give a YAML file or only --name value"
            )
        if path.stat().st_size > _LARGEST:
            raise UsageError(f"{path} has more than {_LARGEST // 1024} KiB; write only fields of this command into it")
        with as_usage_error(UnicodeDecodeError, prefix=f"{path} is not UTF-8, save it as such: "):
            text = path.read_text(encoding="utf-8-sig")
    with as_usage_error(yaml.YAMLError, prefix=f"{path} is not valid YAML: "):
        _check_events(text, path)
        fields = yaml.load(text, Loader=_FieldsLoader)
        if not isinstance(fields, dict):
            raise UsageError(f"{path} holds no fields; write one 'field: value' a line")
        return _words(fields, path, parser)


def _check_events(text: str, path: Path) -> None:
    """Refuse, before anything is built, what can grow beyond the file's size, or takes long to read."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.BaseLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise UsageError(f"{path} is nested too deeply; flatten it")
        if isinstance(event, yaml.AliasEvent):
            raise UsageError(f"{path} uses a YAML alias (*name); write the value out")


def _words(fields: dict[Any, Any], path: Path, parser: CommandParser) -> list[str]:
    unknown = [str(name) for name in fields if name not in parser.names()]
    if unknown:
        raise UsageError(f"{path}: unknown field {unknown[0]!r}; {parser.suggestion(unknown[0])}")
    words: list[str] = []
    for name, value in fields.items():
        if isinstance(value, dict) or (isinstance(value, list) and not all(isinstance(item, str) for item in value)):
            words.append(f"--{name}={json.dumps(_typed(value))}")
        elif isinstance(value, list):
            words += [f"--{name}", *value]
        elif value not in ("", "null", "~"):
            words.append(f"--{name}={value}")
    return words


def _typed(value: Any) -> Any:
    """What is nested in a field, with scalars as JSON has them."""
    if isinstance(value, dict):
        return {name: _typed(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_typed(item) for item in value]
    words = {"true": True, "false": False, "null": None, "~": None, "": None}
    if value.lower() in words:
        return words[value.lower()]
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
