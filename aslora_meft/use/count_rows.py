"""``aslora-meft count-rows``: how often a corpus uses each row of a MEFT adapter, for training with `train_rows`."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm
from transformers import set_seed

from aslora_meft.adapter import add_adapter, load_model, load_tokenizer
from aslora_meft.arguments.checks import check_range
from aslora_meft.arguments.config_arguments import METHODS, add_config_arguments, make_config
from aslora_meft.arguments.groups import BaseWeights
from aslora_meft.arguments.parser import CommandParser
from aslora_meft.arguments.text import local_path
from aslora_meft.data.samples import Sample
from aslora_meft.errors import UsageError, as_usage_error
from aslora_meft.use.evaluate import as_trained, data_arguments, samples_of
from aslora_meft.use.loaded import UseArguments, activate, load_adapters, model_arguments
from aslora_meft.use.saved import check_saved_adapter
from meft import count_rows


@dataclass(kw_only=True)
class CountArguments(BaseWeights):
    """What is counted, and where the counts go."""

    _argument_group_name = "counting"
    output: str = field(metadata={"help": "File for the counts, .safetensors; one that is there is replaced."})
    max_examples: int | None = field(
        default=None, metadata={"help": "Count the first so many rows or windows of text. None: all."}
    )
    base_model: str | None = field(
        default=None, metadata={"help": "Of an adapter: its base model. None: the one that adapter_config.json names."}
    )
    seed: int = field(
        default=42, metadata={"help": "Of a new adapter's first values: that of the training to come (train's --seed)."}
    )


def run(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UsageError: bad input, in one sentence; nothing is written then.
    """
    parser = CommandParser(
        (data_arguments(), CountArguments),
        prog="aslora-meft count-rows",
        usage="aslora-meft count-rows MODEL_OR_ADAPTER --data DATA --output COUNTS [--name value ...]",
        description="Count how often the examples of a corpus use each row of a MEFT adapter, for --train_rows.\n"
        "MODEL_OR_ADAPTER is the folder of a saved adapter; or a model, for the adapter that `train --method meft`\n"
        "begins with, given the same r, num_experts and seed.",
        example="aslora-meft count-rows MODEL --r 4096 --data corpus.txt --output counts.safetensors",
        common=("max_examples", "max_length", "r", "num_experts", "seed", "base_model"),
    )
    parser.add_argument("name", metavar="MODEL_OR_ADAPTER", help="A model, or the folder of a saved MEFT adapter.")
    add_config_arguments(parser, {"meft": METHODS["meft"]})
    values = parser.read(argv)
    name = values.pop("name")
    options = CountArguments(**{f.name: values.pop(f.name) for f in dataclasses.fields(CountArguments)})
    if options.max_examples is not None:
        check_range("max_examples", options.max_examples, 1, 2**31)
    output = local_path("output", options.output)
    if output.is_dir():
        raise UsageError(f"output={options.output!r} is a folder; give the name of a file")
    if not output.parent.is_dir():
        raise UsageError(f"output={options.output!r}: the folder {str(output.parent)!r} does not exist; make it")
    data = {f.name: values.pop(f.name) for f in dataclasses.fields(data_arguments())}
    if (Path(name).expanduser() / CONFIG_NAME).is_file():
        model, adapter, samples = _saved(name, options, values, data)
    else:
        model, adapter, samples = _new(name, options, values, data)
    samples = samples[: options.max_examples]
    with (
        as_usage_error(ValueError),
        as_usage_error(OSError, SafetensorError, prefix=f"output={options.output!r} cannot be written: "),
    ):
        count_rows(model, _batches(samples, model.device), output, adapter)
    tokens = sum(len(sample["input_ids"]) for sample in samples)
    print(f"Counts of {len(samples):,} examples, {tokens:,} tokens: {output.resolve()}")


def _batches(samples: list[Sample], device: torch.device) -> Iterator[dict[str, Tensor]]:
    for sample in tqdm(samples, desc="examples", disable=None):
        yield {"input_ids": torch.tensor([sample["input_ids"]], device=device)}


def _saved(
    folder: str, options: CountArguments, fields: dict[str, Any], data: dict[str, Any]
) -> tuple[Any, str, list[Sample]]:
    """A saved adapter in its base model, its name, and the data."""
    if fields:
        raise UsageError(f"{next(iter(fields))} is that of the adapter in '{folder}' already; leave it out")
    kind = check_saved_adapter("MODEL_OR_ADAPTER", folder).get("peft_type")
    if kind != "MEFT":
        raise UsageError(f"'{folder}' holds an adapter of type {kind}, which has no rows; give one of MEFT")
    loaded = load_adapters([folder], _use(options, options.base_model))
    activate(loaded.model, loaded.names[0])
    samples = samples_of(as_trained(data, loaded.results.get("data_form", {})), loaded.tokenizer, None)
    return loaded.model, loaded.names[0], samples


def _new(
    name: str, options: CountArguments, fields: dict[str, Any], data: dict[str, Any]
) -> tuple[Any, str, list[Sample]]:
    """The adapter that a training with these fields and this seed begins with."""
    config = make_config("meft", {key: value for key, value in fields.items() if key != "train_rows"})
    wanted = model_arguments(name, _use(options, None))
    tokenizer = load_tokenizer(wanted)
    samples = samples_of(as_trained(data, {}), tokenizer, None)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = device or torch.device("cpu")
    base = load_model(wanted, device)
    if not getattr(base, "is_quantized", False):
        base.to(device)  # type: ignore[arg-type]  # of a decorated method
    set_seed(options.seed)
    return add_adapter(base, config, gradient_checkpointing=False), "default", samples


def _use(options: CountArguments, model: str | None) -> UseArguments:
    weights = {f.name: getattr(options, f.name) for f in dataclasses.fields(BaseWeights)}
    return UseArguments(model=model, **weights)
