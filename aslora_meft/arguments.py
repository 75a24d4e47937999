"""The fields of ``aslora-meft train`` and how they are read from a YAML file and the command line."""

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from aslora_meft.errors import RaisingParser, UsageError, as_usage_error


def _doc(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class ModelArguments:
    """Which model is fine-tuned, and by which method."""

    _argument_group_name = "model"
    model: str = field(metadata=_doc("Folder or hub id of a causal language model."))
    method: Literal["aslora", "meft", "lora"] = field(default="aslora", metadata=_doc("PEFT method of the adapter."))
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata=_doc("Type of the base weights; auto: float32 on a CPU, elsewhere the type they were saved in."),
    )
    load_in_4bit: bool = field(default=False, metadata=_doc("Quantise the base weights to NF4 with bitsandbytes."))


@dataclass
class AdapterArguments:
    """Fields that the methods share; the names are PEFT's."""

    _argument_group_name = "adapter"
    r: int | None = field(
        default=None, metadata=_doc("Rank, or MEFT's neurons beside each FFN. None: 8, or 4096 with --method meft.")
    )
    lora_alpha: int = field(default=16, metadata=_doc("The update is scaled by lora_alpha / r (not with meft)."))
    dropout: float = field(default=0.0, metadata=_doc("Dropout on the adapter's input, in [0, 1) (not with meft)."))
    target_modules: list[str] | None = field(
        default=None,
        metadata=_doc(
            "Names of the adapted modules, or all-linear; with meft of the FFNs. None: the choice for the architecture."
        ),
    )
    exclude_modules: list[str] | None = field(default=None, metadata=_doc("Names of modules to leave alone."))
    layers_to_transform: list[int] | None = field(default=None, metadata=_doc("Indices of the adapted layers."))
    use_rslora: bool = field(default=False, metadata=_doc("Scale by lora_alpha / sqrt(r) instead (not with meft)."))


@dataclass
class SharingArguments:
    """When and how ASLoRA merges layers; the names and defaults are ``ASLoRAConfig``'s."""

    _argument_group_name = "sharing (--method aslora)"
    merge_start: str | None = field(
        default=None, metadata=_doc("Last step without merges: steps (40) or share of the run (0.05). None: 0.05.")
    )
    merge_interval: str | None = field(
        default=None,
        metadata=_doc("From one merge to the next: steps or share of the run. None: spread evenly up to 0.30."),
    )
    num_merges: int | None = field(
        default=None, metadata=_doc("Merges per group of n layers. None: n - max(1, round(0.4 n)).")
    )
    merge_candidates: Literal["all", "adjacent"] = field(default="all", metadata=_doc("Which pairs may merge."))
    merge_scope: Literal["per_projection", "joint"] = field(
        default="per_projection", metadata=_doc("Whether each projection decides alone or all decide together.")
    )
    share_a: Literal["per_projection", "joint"] = field(
        default="per_projection", metadata=_doc("One A per projection, or one for all of equal in_features.")
    )
    similarity: Literal["factor", "product"] = field(
        default="factor", metadata=_doc("Distance between the running averages of B, or between those of B A.")
    )
    merge_value: Literal["upper", "mean"] = field(
        default="upper", metadata=_doc("The merged B: the upper layer's, or the mean weighted by layers.")
    )


@dataclass
class NeuronArguments:
    """How MEFT picks and keeps neurons; the names and defaults are ``MEFTConfig``'s."""

    _argument_group_name = "neurons (--method meft)"
    num_experts: int | None = field(
        default=None, metadata=_doc("Groups of neurons, a divisor of r. None: the divisor next to 4 sqrt(r).")
    )
    experts_per_token: int = field(default=8, metadata=_doc("Groups that the router probes for a token."))
    top_k: int = field(default=64, metadata=_doc("Most neurons that a token uses."))
    placement: Literal["auto", "host", "device"] = field(
        default="auto", metadata=_doc("Where keys and values live; auto: in host memory.")
    )
    retrieval: Literal["auto", "host", "stream", "device-keys", "device-rows", "resident"] = field(
        default="auto", metadata=_doc("How rows come to a GPU. auto: what fits its memory and is fastest there.")
    )
    backward_rows: Literal["auto", "save", "refetch"] = field(
        default="auto", metadata=_doc("Keep a layer's rows on the GPU for its backward pass, or bring them again.")
    )
    row_dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata=_doc("Type in which rows are read. auto: 16 bits for a 16-bit base model.")
    )


@dataclass
class DataArguments:
    """What is learnt and what is held out."""

    _argument_group_name = "data"
    data: str = field(
        metadata=_doc(
            "A .jsonl, .json, .csv or .txt file, or a hub id. Columns: messages, prompt + completion, or text."
        )
    )
    eval_data: str | None = field(default=None, metadata=_doc("Held-out file or hub id. None: split off from --data."))
    eval_size: float = field(
        default=0.1, metadata=_doc("Held out from --data by a seeded split: a share (< 1) or a number of rows.")
    )
    data_config: str | None = field(default=None, metadata=_doc("Configuration name of a data set on the hub."))
    data_split: str = field(default="train", metadata=_doc("Split of --data on the hub."))
    eval_split: str = field(default="test", metadata=_doc("Split of --eval_data on the hub."))
    prompt_column: str = field(default="prompt", metadata=_doc("Column with the prompt."))
    completion_column: str = field(default="completion", metadata=_doc("Column with what the model shall answer."))
    text_column: str = field(default="text", metadata=_doc("Column with text that is learnt whole."))
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
    logging_steps: float = field(
        default=10, metadata=_doc("Log every so many steps, or below 1 that share of the run.")
    )

    def __post_init__(self) -> None:
        """Page-locked memory only where there is a device to copy to: torch warns at every loader otherwise."""
        super().__post_init__()
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()


class TrainArguments(NamedTuple):
    """Everything one training run is told."""

    model: ModelArguments
    adapter: AdapterArguments
    sharing: SharingArguments
    neurons: NeuronArguments
    data: DataArguments
    trainer: TrainerArguments


_GROUPS: tuple[Any, ...] = (
    ModelArguments,
    AdapterArguments,
    SharingArguments,
    NeuronArguments,
    DataArguments,
    TrainerArguments,
)


class _TrainParser(RaisingParser, HfArgumentParser):
    pass


def parse_train(argv: list[str]) -> TrainArguments:
    """Read ``[CONFIG.yaml] [--field value ...]``; the command line wins over the file, the file over the defaults.

    Raises:
        UsageError: an unknown or missing field, or a value of the wrong type.
    """
    parser = _TrainParser(
        _GROUPS,
        prog="aslora-meft train",
        usage="aslora-meft train [CONFIG.yaml] [--field value ...]",
        description="Fine-tune a causal language model with an adapter. CONFIG.yaml holds the same fields.",
        allow_abbrev=False,
    )
    if argv and not argv[0].startswith("-"):
        argv = [*_yaml_arguments(Path(argv[0])), *argv[1:]]
    # TrainingArguments checks its own values when it is built.
    with as_usage_error(ValueError):
        *groups, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    if unknown:
        raise UsageError(f"unknown argument {unknown[0]!r}; {_suggestion(unknown[0].lstrip('-').split('=')[0])}")
    return TrainArguments(*groups)


def _yaml_arguments(path: Path) -> list[str]:
    """The file's fields as command-line words, so that both are checked by one parser."""
    if not path.is_file():
        raise UsageError(f"the configuration file {str(path)!r} does not exist; give a YAML file or only --field value")
    with as_usage_error(yaml.YAMLError, UnicodeDecodeError, prefix=f"{path} is not valid YAML: "):
        # BaseLoader leaves every scalar as written: "no" and "1e-3" mean what they mean on the command line.
        fields = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    if not isinstance(fields, dict):
        raise UsageError(f"{path} holds no fields; write one 'field: value' a line")
    unknown = [str(name) for name in fields if name not in _field_names()]
    if unknown:
        raise UsageError(f"{path}: unknown field {unknown[0]!r}; {_suggestion(unknown[0])}")
    words: list[str] = []
    for name, value in fields.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            words.append(f"--{name}={json.dumps(value)}")
        elif value not in ("", "null", "~"):
            words.append(f"--{name}={value}")
    return words


def _field_names() -> list[str]:
    return [item.name for group in _GROUPS for item in dataclasses.fields(group) if item.init]


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name.replace("-", "_"), _field_names(), n=1)
    return f"did you mean {close[0]!r}?" if close else "aslora-meft train --help lists the fields"
